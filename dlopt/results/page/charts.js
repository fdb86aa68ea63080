// Line charts with bands in SVG: zoom by dragging or keys, a tooltip with all lines, log axes, export as PNG, SVG and CSV.

let isPrinting = false;

function widthOf(container) {
  return isPrinting ? 690 : Math.max(280, container.clientWidth);
}

// Draws a chart into a new element. lines: {label, style, points: [[x, mean, low, high, count, raw], ...], marks}
// options: {id, key, name, nameX, nameY, logX, logY, integers, textY, read, height, extra, below, lanes: pixels of `below`, ticks: x-values, more: x-values}
function drawChart(container, lines, options) {
  const isUsable = (p) => !(options.logY && p[1] <= 0) && !(options.logX && p[0] <= 0);
  const drawn = lines.map((line) => ({ ...line, points: line.points.filter(isUsable) })).filter((line) => line.points.length);
  if (!drawn.length) return void container.replaceChildren(html("p", { class: "note" }, "No data."));
  const xs = [...new Set([...drawn.flatMap((line) => line.points.map((p) => p[0])), ...(options.more || [])])].sort((a, b) => a - b);
  const root = svg("svg", { class: "plot", tabindex: 0, role: "img",
    "aria-label": `${options.name}. Arrow keys read the values, + and - zoom, 0 resets the zoom.` });
  const reset = html("button", { type: "button", class: "reset", hidden: true, onclick: () => zoomTo(chart, null) }, "Reset zoom");
  const chart = { lines: drawn, options, xs, root, reset, cursor: null, zoom: null };
  container.replaceChildren(root, reset, exportButtons(options.name, root, () => chartTable(chart), drawn));
  chart.width = widthOf(container);
  chart.height = options.height || (chart.width < 500 ? 260 : 340);
  root.addEventListener("keydown", (event) => onKey(chart, event));
  root.addEventListener("blur", () => readValues(chart, null));
  const saved = state.zooms[options.id];
  if (saved && saved.key === options.key) chart.zoom = saved;
  paintChart(chart);
}

// -- drawing

function paintChart(chart) {
  const { root, lines, options, width, height } = chart;
  chart.reset.hidden = !chart.zoom;
  const [lowX, highX] = chart.zoom ? chart.zoom.x : rangeX(chart), [lowY, highY] = (chart.zoom && chart.zoom.y) || rangeY(chart, lowX, highX);
  const lanes = options.lanes || 0, bottom = height - 42 - lanes, ticksY = options.logY ? ticksOfDecades(lowY, highY) : linearTicks(lowY, highY, height / 45);
  const left = 30 + 7 * Math.max(2, ...ticksY.map((tick) => options.textY(tick).length)), right = width - 16;
  const x = chart.x = scaleOf(lowX, highX, left, right, options.logX), y = chart.y = scaleOf(lowY, highY, bottom, 8, options.logY);
  const tried = apart((options.ticks || []).filter((tick) => tick >= lowX && tick <= highX), x);
  const ticksX = tried.length > 1 ? tried : options.logX ? ticksOfDecades(lowX, highX) : linearTicks(lowX, highX, (right - left) / 70, options.integers);
  const area = chart.area = { x: left, y: 8, width: right - left, height: bottom - 8 }, clip = `clip-${options.id}`;
  fill(root, { viewBox: `0 0 ${width} ${height}`, width, height }, []);
  root.replaceChildren(
    svg("clipPath", { id: clip }, svg("rect", area)), svg("clipPath", { id: `${clip}-below` }, svg("rect", { ...area, x: left - 6, width: right - left + 12, height })),
    ...ticksX.flatMap((tick) => [gridLine(x(tick), 8, x(tick), bottom), label(x(tick), bottom + lanes + 16, formatNumber(tick))]),
    ...ticksY.flatMap((tick) => [gridLine(left, y(tick), right, y(tick)), label(left - 5, y(tick) + 4, options.textY(tick), "end")]),
    svg("path", { class: "axis", fill: "none", d: `M${left} 8V${bottom}H${right}` }),
    label((left + right) / 2, height - 8, options.nameX),
    svg("text", { transform: `translate(12 ${(8 + bottom) / 2}) rotate(-90)`, "text-anchor": "middle",
      textLength: 6.7 * options.nameY.length > bottom ? bottom : null, lengthAdjust: "spacingAndGlyphs" }, options.nameY),
    svg("g", { "clip-path": `url(#${clip})` }, ...lines.map((line) => bandPath(line, x, y, options.logY)),
      ...lines.flatMap((line) => linePaths(line, x, y)), ...(options.extra ? options.extra(x, y) : [])),
    svg("g", { "clip-path": `url(#${clip}-below)` }, ...(options.below ? options.below(x, bottom) : [])),
    chart.cursorLine = svg("line", { class: "cursor", y1: 8, y2: bottom, visibility: "hidden" }),
    chart.selection = svg("rect", { class: "selection", visibility: "hidden" }), pointerArea(chart));
}

function scaleOf(low, high, from, to, isLog) {
  const t = isLog ? Math.log : Number, back = isLog ? Math.exp : Number, span = t(high) - t(low) || 1;
  const scale = (value) => from + ((t(value) - t(low)) / span) * (to - from);
  scale.invert = (position) => back(t(low) + ((position - from) / (to - from)) * span);
  return scale;
}

function gridLine(x1, y1, x2, y2) {
  return svg("line", { class: "rule", x1, y1, x2, y2 });
}

function label(x, y, text, anchor = "middle") {
  return svg("text", { x, y, "text-anchor": anchor }, text);
}

const pen = html("canvas").getContext("2d");

function textWidth(text) {
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

function pathOf(points) {
  return `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
}

function bandPath({ points, style }, x, y, isLog) {
  if (points.every((p) => p[2] === p[3])) return null;
  const edge = (k) => points.map((p) => [x(p[0]), y(isLog && !(p[k] > 0) ? p[1] / 1e3 : p[k])]);
  return svg("path", { d: `${pathOf([...edge(3), ...edge(2).reverse()])}Z`, fill: `var(${style.colour})`, "fill-opacity": 0.16 });
}

// Returns the line, its marks if it has few points, and the raw line behind a smoothed one.
function linePaths({ points, style, marks }, x, y) {
  const stroke = `var(${style.colour})`, at = (k) => points.map((p) => [x(p[0]), y(p[k])]), line = at(1);
  const raw = points[0].length > 5 && svg("path", { class: "raw", d: pathOf(at(5)), fill: "none", stroke, "stroke-opacity": 0.3 });
  const dots = marks || points.length < 10 ? line.map(([cx, cy]) => svg("circle", { cx, cy, r: 3.5, fill: stroke })) : [];
  return [...(raw ? [raw] : []),
    svg("path", { d: pathOf(line), fill: "none", stroke, "stroke-width": 2, "stroke-dasharray": style.dash.join(" ") || null }), ...dots];
}

// -- ranges and ticks

function rangeX({ xs, options }) {
  if (options.logX) return [xs[0] / 1.4, xs.at(-1) * 1.4];
  return xs.length === 1 ? [xs[0] - 0.5, xs[0] + 0.5] : [xs[0], xs.at(-1)];
}

function rangeY({ lines, options }, lowX, highX) {
  const shown = lines.flatMap((line) => line.points.filter((p) => p[0] >= lowX && p[0] <= highX));
  const [low, high] = extent(shown.flatMap((p) => [p[1], p[2], p[3], p[5] ?? null]).filter((value) => !options.logY || value > 0));
  if (!Number.isFinite(low)) return [options.logY ? 0.1 : 0, 1];
  if (options.logY) {
    const bottom = Math.max(low / 1.15, high * 1e-6);
    return [bottom, high * 1.15];
  }
  const margin = 0.06 * (high - low) || 0.1 * Math.abs(low) || 0.1;
  return [low - margin, high + margin];
}

function linearTicks(low, high, count, integers = false) {
  const least = (high - low) / Math.max(count, 2), power = 10 ** Math.floor(Math.log10(least));
  const step = Math.max([1, 2, 5, 10].find((factor) => factor * power >= least) * power, integers ? 1 : 0);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.min(Math.max(last - first + 1, 0), 50) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// Returns the ticks whose labels do not overlap.
function apart(ticks, x) {
  let end = -Infinity;
  return ticks.filter((tick) => {
    const half = 3.5 * formatNumber(tick).length + 4, isFree = x(tick) - half > end;
    if (isFree) end = x(tick) + half;
    return isFree;
  });
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

// -- zoom

function zoomTo(chart, zoom) {
  if (zoom) state.zooms[chart.options.id] = { key: chart.options.key, ...zoom };
  else delete state.zooms[chart.options.id];
  chart.zoom = zoom;
  saveState();
  paintChart(chart);
}

// Zooms in x about the cursor, or the centre.
function zoomBy(chart, factor) {
  const { x, area } = chart, [low, high] = rangeX(chart);
  const centre = chart.cursor === null ? area.x + area.width / 2 : x(chart.cursor);
  const from = Math.max(low, x.invert(centre - (centre - area.x) * factor)), to = Math.min(high, x.invert(centre + (area.x + area.width - centre) * factor));
  zoomTo(chart, from === low && to === high ? null : { x: [from, to], y: null });
}

function pointerArea(chart) {
  const { root, area, selection } = chart, surface = svg("rect", { class: "over", ...area, fill: "transparent" });
  let start = null;
  const at = (event) => {
    const box = root.getBoundingClientRect(), scale = chart.width / box.width, clamp = (value, low, size) => Math.min(Math.max(value, low), low + size);
    return [clamp((event.clientX - box.left) * scale, area.x, area.width), clamp((event.clientY - box.top) * scale, area.y, area.height)];
  };
  const boxTo = ([x, y]) => { // a flat box selects all values of y
    const isFlat = Math.abs(y - start[1]) < 40;
    return { x: Math.min(x, start[0]), width: Math.abs(x - start[0]), y: isFlat ? area.y : Math.min(y, start[1]), height: isFlat ? area.height : Math.abs(y - start[1]), isFlat };
  };
  surface.addEventListener("pointerdown", (event) => {
    start = at(event);
    surface.setPointerCapture(event.pointerId);
  });
  surface.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    readValues(chart, chart.x.invert(x), y);
    if (start) fill(selection, { ...boxTo([x, y]), visibility: "visible" }, []);
  });
  surface.addEventListener("pointerup", (event) => {
    const box = start && boxTo(at(event));
    start = null;
    fill(selection, { visibility: "hidden" }, []);
    if (!box || box.width < 5) return;
    const y = box.isFlat ? null : [chart.y.invert(box.y + box.height), chart.y.invert(box.y)];
    zoomTo(chart, { x: [chart.x.invert(box.x), chart.x.invert(box.x + box.width)], y });
  });
  surface.addEventListener("pointercancel", () => { start = null; });
  surface.addEventListener("pointerleave", () => readValues(chart, null));
  surface.addEventListener("dblclick", () => zoomTo(chart, null));
  return surface;
}

function onKey(chart, event) {
  const { area } = chart, shown = chart.xs.filter((x) => chart.x(x) >= area.x - 0.5 && chart.x(x) <= area.x + area.width + 0.5);
  const current = shown.indexOf(chart.cursor), move = (i) => readValues(chart, shown[Math.min(Math.max(i, 0), shown.length - 1)]);
  const actions = {
    ArrowLeft: () => move(current < 0 ? shown.length - 1 : current - 1), ArrowRight: () => move(current < 0 ? 0 : current + 1),
    Home: () => move(0), End: () => move(shown.length - 1), "+": () => zoomBy(chart, 0.5), "-": () => zoomBy(chart, 2), 0: () => zoomTo(chart, null),
    Escape: () => readValues(chart, null),
  };
  if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[event.key]();
}

// -- tooltip: all lines at the x-value nearest to the cursor, highest first; the line nearest to the pointer is bold

function readValues(chart, x, y = null) {
  const { lines, xs, options, area, root } = chart;
  chart.cursor = x === null || x === undefined ? null : nearest(xs, x, chart.x);
  fill(chart.cursorLine, chart.cursor === null ? { visibility: "hidden" } : { x1: chart.x(chart.cursor), x2: chart.x(chart.cursor), visibility: "visible" }, []);
  if (chart.cursor === null) return hideTooltip();
  const readings = lines.map((line) => [line, nearestPoint(line.points, chart.cursor)]).filter(([, p]) => p).sort(([, a], [, b]) => b[1] - a[1]);
  const height = y ?? area.y + area.height / 2, distance = ([, p]) => Math.abs(chart.y(p[1]) - height);
  const closest = readings.reduce((best, other) => (best && distance(best) <= distance(other) ? best : other), null);
  const box = root.getBoundingClientRect(), scale = box.width / chart.width;
  showTooltip(box.left + scale * chart.x(chart.cursor), box.top + scale * height, `${options.nameX} ${formatNumber(chart.cursor)}`,
    readings.slice(0, 25).map(([line, p]) => [swatch(line.style), closest[0] === line ? html("b", {}, line.label) : line.label, options.read(p)]));
}

function nearest(values, value, scale) {
  return values.reduce((best, other) => (Math.abs(scale(other) - scale(value)) < Math.abs(scale(best) - scale(value)) ? other : best));
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

// -- export

const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "opacity", "visibility", "font-family",
  "font-size", "font-weight", "text-anchor", "paint-order"];

// Returns the buttons that save a plot, and its data: rows of cells, the first of which has the names of the columns.
function exportButtons(name, root, table, lines = []) {
  const file = name.replace(/[^\w]+/g, "_"), button = (text, save) => html("button", { type: "button", title: `${name} as ${text}`, "data-save": text, onclick: save }, text);
  return html("div", { class: "save screen" }, "Save as ",
    button("PNG", async () => download(`${file}.png`, await pngOf(standalone(root, lines)))),
    button("SVG", () => download(`${file}.svg`, new Blob([serialized(standalone(root, lines))], { type: "image/svg+xml" }))),
    button("CSV", () => download(`${file}.csv`, new Blob([table().map((row) => `${row.map(csvCell).join(",")}\n`).join("")], { type: "text/csv" }))));
}

function download(name, content) {
  const link = html("a", { href: URL.createObjectURL(content), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Quotes texts that a spreadsheet would evaluate as formulas.
function csvCell(value) {
  const text = String(value ?? ""), isFormula = /^[=+\-@]/.test(text) && !Number.isFinite(Number(text));
  return /[",\n]/.test(text) || isFormula ? `"${isFormula ? "'" : ""}${text.replaceAll('"', '""')}"` : text;
}

// Returns a copy of a plot with the styles of the page on white, and a legend below.
function standalone(root, lines) {
  document.documentElement.classList.add("printing");
  const copy = root.cloneNode(true), copies = [copy, ...copy.querySelectorAll("*")];
  [root, ...root.querySelectorAll("*")].forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of STYLES) copies[i].setAttribute(name, style.getPropertyValue(name));
    copies[i].removeAttribute("style");
  });
  const [, , width, height] = root.getAttribute("viewBox").split(" ").map(Number), page = getComputedStyle(document.documentElement);
  lines.forEach((line, i) => {
    const y = height + 14 + 18 * i, stroke = page.getPropertyValue(line.style.colour).trim();
    copy.append(svg("line", { x1: 30, x2: 56, y1: y, y2: y, stroke, "stroke-width": 2.5, "stroke-dasharray": line.style.dash.join(" ") || null }),
      svg("text", { x: 64, y: y + 4, "font-size": 12, "font-family": page.fontFamily || "sans-serif", fill: page.getPropertyValue("--ink").trim() }, line.label));
  });
  document.documentElement.classList.toggle("printing", isPrinting);
  copy.querySelectorAll(".over, .cursor, .selection").forEach((node) => node.remove());
  const size = { width, height: height + 18 * lines.length + (lines.length ? 8 : 0) };
  copy.prepend(svg("rect", { width: "100%", height: "100%", fill: "#ffffff" }));
  return fill(copy, { ...size, viewBox: `0 0 ${size.width} ${size.height}` }, []);
}

function serialized(root) {
  return new XMLSerializer().serializeToString(root);
}

async function pngOf(root, scale = 2) {
  const image = new Image(), canvas = html("canvas", { width: scale * root.getAttribute("width"), height: scale * root.getAttribute("height") });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(serialized(root))}`;
  await image.decode();
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function chartTable({ lines, options }) {
  const hasRaw = lines.some((line) => line.points[0].length > 5);
  const rows = lines.flatMap((line) => line.points.map((p) => [line.label, p[0], hasRaw ? p[5] : p[1], p[2], p[3], p[4], ...(hasRaw ? [p[1]] : [])]));
  return [["line", options.nameX, options.nameY, "low", "high", "runs", ...(hasRaw ? ["smoothed"] : [])], ...rows];
}
