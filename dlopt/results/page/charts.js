// Line charts with bands by uPlot: zoom by dragging or keys, a tooltip with all lines, log axes, print.

const SHARP = 2; // pixels of a printed chart per pixel of the page

// Draws a chart into a new element. lines: {label, style, points: [[x, mean, low, high, count], ...], marks}
// options: {id, key, name, nameX, nameY, logX, logY, integers, textY, read, height, extra, footer, more: x-values}
function drawChart(container, lines, options) {
  for (const u of container.charts || []) u.destroy();
  const usable = lines.map((line) => ({ ...line, points: line.points.filter((p) => !options.logY || p[1] > 0) }));
  const drawn = usable.filter((line) => line.points.length);
  if (!drawn.length) return void container.replaceChildren(html("p", { class: "note" }, "No data."));
  const chart = { lines: drawn, options, container, xs: [...new Set([...drawn.flatMap((line) => line.points.map((p) => p[0])), ...(options.more || [])])].sort((a, b) => a - b) };
  const reset = html("button", { type: "button", class: "reset", hidden: true, onclick: () => zoomTo(chart, null) }, "Reset zoom");
  const target = html("div", { class: "plot", tabindex: 0, role: "img",
    "aria-label": `${options.name}. Arrow keys read the values, + and - zoom, 0 resets the zoom.` });
  container.replaceChildren(target, reset);
  Object.assign(chart, { target, reset });
  chart.u = new uPlot(uplotOptions(chart), uplotData(chart), target);
  container.charts = [chart.u];
  target.addEventListener("keydown", (event) => onKey(chart, event));
  target.addEventListener("blur", () => { chart.u.setCursor({ left: -10, top: -10 }); });
  const saved = state.zooms[options.id];
  if (saved && saved.key === options.key) zoomTo(chart, saved);
}

// Returns the x-values, then low and high of every line (below all lines), then the means.
function uplotData({ lines, xs, options }) {
  const index = new Map(xs.map((x, i) => [x, i]));
  const column = (line, k) => {
    const values = Array(xs.length).fill(null);
    for (const p of line.points) values[index.get(p[0])] = options.logY && !(p[k] > 0) ? p[1] / 1e3 : p[k];
    return values;
  };
  return [xs, ...lines.flatMap((line) => [column(line, 2), column(line, 3)]), ...lines.map((line) => column(line, 1))];
}

function uplotOptions(chart) {
  const { lines, options, container } = chart;
  const scale = isPrinting ? SHARP : 1, width = isPrinting ? 690 : Math.max(280, container.clientWidth);
  const ink = colourOf("--ink"), font = `${12 * scale}px system-ui, sans-serif`;
  const edge = { show: true, spanGaps: true, points: { show: false } };
  const mean = (line) => {
    const colour = colourOf(line.style.colour), isShort = line.marks || line.points.length < 10;
    return { spanGaps: true, stroke: colour, width: 2 * scale, dash: line.style.dash.map((length) => length * scale),
      points: { show: isShort, size: 7 * scale, fill: colour, stroke: colour } };
  };
  const axis = (more) => ({ stroke: ink, font, labelFont: font, gap: 4 * scale, labelSize: 18 * scale, labelGap: 0,
    grid: { stroke: colourOf("--grid"), width: scale }, ticks: { show: false }, border: { show: true, stroke: colourOf("--soft"), width: scale }, ...more });
  const logTicks = (u, index, low, high) => ticksOfDecades(low, high);
  const log = { splits: logTicks, filter: (u, splits) => splits };
  return {
    width: width * scale, height: (options.height || (width < 500 ? 260 : 340)) * scale, legend: { show: false }, padding: [8 * scale, 16 * scale, 0, 0],
    series: [{}, ...lines.flatMap(() => [edge, edge]), ...lines.map(mean)],
    bands: lines.map((line, i) => ({ series: [2 * i + 2, 2 * i + 1], fill: withAlpha(colourOf(line.style.colour), 0.16) })),
    scales: {
      x: { time: false, distr: options.logX ? 3 : 1, range: (u, low, high) => rangeX(chart, low, high) },
      y: { distr: options.logY ? 3 : 1, range: (u, low, high) => rangeY(chart, low, high) },
    },
    axes: [
      axis({ label: options.nameX, size: 24 * scale, space: 60 * scale, values: (u, ticks) => ticks.map((tick) => formatNumber(tick)),
        ...(options.logX ? log : options.integers ? { incrs: INTEGERS } : {}) }),
      axis({ label: options.nameY, space: 40 * scale, values: (u, ticks) => ticks.map(options.textY), ...(options.logY ? log : {}),
        size: (u, texts) => (14 + 7 * Math.max(2, ...(texts || []).map((text) => text.length))) * scale }),
    ],
    cursor: {
      y: false, points: { show: false }, drag: { setScale: false, x: true, y: true, uni: 40 },
      bind: { dblclick: () => () => zoomTo(chart, null) },
    },
    hooks: { setCursor: [() => readValues(chart)], setSelect: [() => zoomToSelection(chart)], draw: [(u) => options.extra && options.extra(u, scale)] },
  };
}

const INTEGERS = Array.from({ length: 13 }, (_, power) => [1, 2, 5].map((factor) => factor * 10 ** power)).flat();

function withAlpha(colour, alpha) {
  const number = parseInt(colour.trim().slice(1), 16);
  return `rgba(${number >> 16}, ${(number >> 8) & 255}, ${number & 255}, ${alpha})`;
}

// Returns powers of ten; over less than two decades also their doubles and halves.
function ticksOfDecades(low, high) {
  const decades = Math.log10(high / low), marks = decades < 2 ? [1, 2, 5] : [1], every = Math.max(1, Math.ceil(decades / 7));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % every === 0) for (const mark of marks) ticks.push(Number((mark * 10 ** power).toPrecision(6)));
  }
  return ticks.filter((tick) => tick >= low && tick <= high);
}

function rangeX({ xs, options }, low, high) {
  if (low > xs[0] || high < xs.at(-1)) return [low, high]; // zoomed
  if (options.logX) return [low / 1.4, high * 1.4];
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

function rangeY({ options }, low, high) {
  if (low === null || !Number.isFinite(low)) return [0, 1];
  if (options.logY) {
    const bottom = Math.max(low / 1.15, high * 1e-6);
    return [bottom * (bottom / high) ** (0.06 * (options.footer || 0)), high * 1.15];
  }
  const margin = 0.06 * (high - low) || 0.1 * Math.abs(low) || 0.1;
  return [low - margin * (1 + (options.footer || 0)), high + margin];
}

// -- zoom

function zoomTo(chart, zoom) {
  const { u, xs, options } = chart;
  if (zoom) state.zooms[options.id] = zoom;
  else delete state.zooms[options.id];
  saveState();
  chart.reset.hidden = !zoom;
  u.batch(() => {
    u.setScale("x", zoom ? { min: zoom.x[0], max: zoom.x[1] } : { min: xs[0], max: xs.at(-1) });
    if (zoom && zoom.y) u.setScale("y", { min: zoom.y[0], max: zoom.y[1] });
  });
}

function zoomToSelection(chart) {
  const { u, options } = chart, { left, top, width, height } = u.select;
  if (!width || !height) return;
  u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  const isAllY = height >= u.over.clientHeight - 1, isAllX = width >= u.over.clientWidth - 1;
  const { min, max } = u.scales.x;
  const x = isAllX ? [min, max] : [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
  if (width > 3 && height > 3) zoomTo(chart, { key: options.key, x, y: isAllY ? null : [u.posToVal(top + height, "y"), u.posToVal(top, "y")] });
}

// Zooms in x about the cursor, or the centre.
function zoomBy(chart, factor) {
  const { u, xs, options } = chart, full = u.over.clientWidth, centre = u.cursor.left >= 0 ? u.cursor.left : full / 2;
  const low = Math.max(xs[0], u.posToVal(centre - centre * factor, "x")), high = Math.min(xs.at(-1), u.posToVal(centre + (full - centre) * factor, "x"));
  zoomTo(chart, low === xs[0] && high === xs.at(-1) ? null : { key: options.key, x: [low, high], y: null });
}

function onKey(chart, event) {
  const { u, xs } = chart, first = u.valToIdx(u.scales.x.min), last = u.valToIdx(u.scales.x.max);
  const current = u.cursor.idx ?? null;
  const move = (i) => u.setCursor({ left: u.valToPos(xs[Math.min(Math.max(i, first), last)], "x"), top: u.over.clientHeight / 2 });
  const actions = {
    ArrowLeft: () => move(current === null ? last : current - 1), ArrowRight: () => move(current === null ? first : current + 1),
    Home: () => move(first), End: () => move(last), "+": () => zoomBy(chart, 0.5), "-": () => zoomBy(chart, 2), 0: () => zoomTo(chart, null),
    Escape: () => u.setCursor({ left: -10, top: -10 }),
  };
  if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[event.key]();
}

// -- tooltip: all lines at the x-value nearest to the cursor, best first; the line nearest to the cursor is bold

function readValues(chart) {
  const { u, lines, xs, options } = chart;
  if (!u || u.cursor.left < 0 || u.cursor.idx === null || u.cursor.idx === undefined) return hideTooltip();
  const at = xs[u.cursor.idx], box = u.over.getBoundingClientRect();
  const readings = lines.map((line) => [line, nearestPoint(line.points, at)]).filter(([, p]) => p).sort(([, a], [, b]) => b[1] - a[1]);
  const distance = (p) => Math.abs(u.valToPos(p[1], "y") - u.cursor.top);
  const closest = readings.reduce((best, other) => (best && distance(best[1]) <= distance(other[1]) ? best : other), null);
  showTooltip(box.left + u.cursor.left, box.top + u.cursor.top, `${options.nameX} ${formatNumber(at)}`,
    readings.map(([line, p]) => [swatch(line.style), closest[0] === line ? html("b", {}, line.label) : line.label, options.read(p)]));
}

// Returns the point of a line nearest to x, at most half a step away, or null.
function nearestPoint(points, x) {
  let best = null, gap = Infinity;
  points.forEach((p, i) => {
    const distance = Math.abs(p[0] - x);
    const step = Math.max(i ? p[0] - points[i - 1][0] : 0, i + 1 < points.length ? points[i + 1][0] - p[0] : 0);
    if (distance < gap && distance <= step / 2) [best, gap] = [p, distance];
    if (distance === 0) [best, gap] = [p, 0];
  });
  return best;
}
