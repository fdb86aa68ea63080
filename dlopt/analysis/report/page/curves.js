// Charts of curves: means over seeds with bands, and a tooltip.

function studentT(degrees) {
  return degrees <= data.t.length ? data.t[degrees - 1] : 1.96 + 2.46 / degrees;
}

function interpolate(points, x) {
  const last = points.length - 1;
  if (x < points[0][0] || x > points[last][0]) return null;
  let low = 0, high = last;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  const [a, b] = [points[low], points[high]];
  return b[0] === a[0] || x === a[0] ? a[1] : a[1] + ((x - a[0]) / (b[0] - a[0])) * (b[1] - a[1]);
}

// Returns [x, mean, low, high, count] at every x that at least half of the runs reach.
function aggregate(runs, metric, x, band) {
  const curves = runs.map((run) => run.curve[x].map((value, i) => [value, run.curve[metric] ? run.curve[metric][i] : null])
    .filter(([a, b]) => a !== null && b !== null)).filter((points) => points.length);
  if (!curves.length) return [];
  let grid;
  if (x === "seconds") {
    const [low] = extent(curves.map((points) => points[0][0])), [, high] = extent(curves.map((points) => points.at(-1)[0]));
    grid = curves.length === 1 ? curves[0].map(([value]) => value) : Array.from({ length: 80 }, (_, i) => low + (i / 79) * (high - low));
  } else {
    grid = [...new Set(curves.flatMap((points) => points.map(([value]) => value)))].sort((a, b) => a - b);
  }
  const result = [];
  for (const at of grid) {
    const values = curves.map((points) => interpolate(points, at)).filter((value) => value !== null);
    if (2 * values.length < curves.length) continue;
    const n = values.length, mean = values.reduce((a, b) => a + b, 0) / n;
    const std = n > 1 ? Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1)) : 0;
    const half = n < 2 || band === "none" ? 0 : band === "std" ? std : (studentT(n - 1) * std) / Math.sqrt(n);
    const [low, high] = band === "range" ? extent(values) : [mean - half, mean + half];
    result.push([at, mean, low, high, n]);
  }
  return result;
}

// Draws a chart with axes and tooltip. series: {label, style, points: [x, y, low, high, count], marks}
function chart(container, series, options) {
  const width = Math.max(280, container.clientWidth), height = options.height || (width < 500 ? 260 : 340);
  const margin = { left: 62, right: 14, top: 10, bottom: 44 };
  let [x0, x1] = extent(series.flatMap((curve) => curve.points.map((p) => p[0])));
  let [y0, y1] = extent(series.flatMap((curve) => curve.points.map((p) => (options.logY && !(p[1] > 0) ? NaN : p[1]))));
  if (!Number.isFinite(x0) || !Number.isFinite(y0)) return container.replaceChildren(html("p", { class: "note" }, "No data yet."));
  if (x0 === x1) [x0, x1] = options.logX ? [x0 / 2, x1 * 2] : [x0 - 0.5, x1 + 0.5];
  if (options.logY) [y0, y1] = [Math.max(y0 / 1.15, y1 * 1e-6), y1 * 1.15];
  else {
    const pad = 0.06 * (y1 - y0) || Math.abs(y0) * 0.1 || 0.1;
    [y0, y1] = [y0 - pad, y1 + pad];
  }
  if (options.logX) [x0, x1] = [x0 / 1.3, x1 * 1.3];
  const x = (options.logX ? logarithmic : linear)(x0, x1, margin.left, width - margin.right);
  const y = (options.logY ? logarithmic : linear)(y0, y1, height - margin.bottom, margin.top);
  const clip = `clip-${container.id}`;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.name },
    svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: margin.left, y: margin.top, width: width - margin.left - margin.right, height: height - margin.top - margin.bottom }))));
  axes(root, x, y, { width, height, margin, ...options });
  const inner = svg("g", { "clip-path": `url(#${clip})` });
  const pathData = (points, of) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(of(p)).toFixed(1)}`).join("");
  const usable = (points) => points.filter((p) => !options.logY || p[1] > 0);
  for (const curve of series) {
    const points = usable(curve.points), banded = points.filter((p) => p[3] > p[2]);
    if (banded.length > 1) {
      const floor = (p) => (options.logY ? Math.max(p[2], y0) : p[2]);
      const back = [...banded].reverse().map((p) => `L${x(p[0]).toFixed(1)} ${y(floor(p)).toFixed(1)}`).join("");
      inner.append(svg("path", { d: `${pathData(banded, (p) => p[3])}${back}Z`, fill: curve.style.colour, opacity: 0.15 }));
    }
  }
  const paths = series.map((curve) => {
    const points = usable(curve.points);
    const path = svg("path", { d: pathData(points, (p) => p[1]), fill: "none", stroke: curve.style.colour, "stroke-width": 2, "stroke-dasharray": curve.style.dash });
    inner.append(path);
    if (curve.marks || points.length === 1) for (const p of points) inner.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 4, fill: curve.style.colour }));
    return path;
  });
  root.append(inner);
  if (options.extra) options.extra(root, x, y, { width, height, margin });
  addTooltip(root, series, paths, x, y, { width, height, margin, ...options });
  container.replaceChildren(root);
}

function axes(root, x, y, o) {
  const bottom = o.height - o.margin.bottom, right = o.width - o.margin.right;
  for (const tick of y.ticks(5)) {
    root.append(svg("line", { class: "grid", x1: o.margin.left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: o.margin.left - 6, y: y(tick) + 4, "text-anchor": "end" }, o.textY(tick)));
  }
  for (const tick of x.ticks(o.width < 500 ? 4 : 8)) {
    root.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: o.margin.top, y2: bottom }),
      svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, formatNumber(tick)));
  }
  root.append(svg("line", { class: "axis", x1: o.margin.left, x2: right, y1: bottom, y2: bottom }),
    svg("line", { class: "axis", x1: o.margin.left, x2: o.margin.left, y1: o.margin.top, y2: bottom }),
    svg("text", { x: (o.margin.left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, o.nameX),
    svg("text", { transform: `translate(13 ${(o.margin.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, o.nameY));
}

// Shows all curves at the x nearest to the pointer in a tooltip, and highlights the nearest curve.
function addTooltip(root, series, paths, x, y, o) {
  const rule = svg("line", { class: "axis", y1: o.margin.top, y2: o.height - o.margin.bottom, "stroke-dasharray": "2 3", visibility: "hidden" });
  root.append(rule);
  const xs = [...new Set(series.flatMap((curve) => curve.points.map((p) => p[0])))].sort((a, b) => a - b);
  const move = (event) => {
    const box = root.getBoundingClientRect(), scale = o.width / box.width;
    const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
    const at = xs.reduce((best, value) => (Math.abs(x(value) - px) < Math.abs(x(best) - px) ? value : best), xs[0]);
    rule.setAttribute("x1", x(at));
    rule.setAttribute("x2", x(at));
    rule.setAttribute("visibility", "visible");
    const readings = series.map((curve, i) => [i, curve, nearestPoint(curve.points, at)]).filter(([, , p]) => p && (!o.logY || p[1] > 0));
    readings.sort(([, , a], [, , b]) => b[1] - a[1]);
    const closest = readings.reduce((best, other) => (best && Math.abs(y(best[2][1]) - py) <= Math.abs(y(other[2][1]) - py) ? best : other), null);
    paths.forEach((path, i) => path.setAttribute("stroke-width", closest && closest[0] === i ? 3.5 : 2));
    showTooltip(event, `${o.nameX} ${o.textX ? o.textX(at) : formatNumber(at)}`, readings.map(([i, curve, p]) => [swatch(curve.style),
      closest && closest[0] === i ? html("b", {}, curve.label) : curve.label, o.read(p)]));
  };
  const leave = () => {
    hideTooltip();
    rule.setAttribute("visibility", "hidden");
    paths.forEach((path) => path.setAttribute("stroke-width", 2));
  };
  root.addEventListener("pointermove", move);
  root.addEventListener("pointerdown", move);
  root.addEventListener("pointerleave", leave);
}

// Returns the point of a curve nearest to x, at most half a step away, or null.
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

// -- sections: learning curves, learning rates

const BANDS = { confidence: "95 % confidence interval", std: "± standard deviation", range: "min to max", none: "none" };

function defaultBand() {
  const maxRuns = Math.max(...data.rows.map((row) => row.runs.length));
  return maxRuns > 2 ? "confidence" : "range"; // with two runs, the confidence interval is 13x wider than their distance from the mean
}

function selectControl(name, label, options, update) {
  return html("label", {}, `${label} `, html("select", { "data-choice": name, onchange: (event) => { state[name] = event.target.value; update(); } },
    ...Object.entries(options).map(([key, text]) => html("option", { value: key, selected: state[name] === key }, text))));
}

function renderCurves(update) {
  const metrics = data.curves.filter((name) => name !== "lr");
  if (!setVisible("curves", metrics.length > 0)) return;
  if (!metrics.includes(state.metric)) state.metric = metrics.includes(data.by) ? data.by : metrics[0];
  if (!BANDS[state.band]) state.band = defaultBand();
  const seeds = data.rows.some((row) => row.runs.length > 1);
  const container = html("div", { class: "chart", id: "curves-chart" });
  const note = seeds ? `Mean over seeds, up to the epoch that at least half of the runs reach. Band: ${BANDS[state.band]}.` : "";
  sectionBody("curves").replaceChildren(
    html("div", { class: "controls" },
      selectControl("metric", "metric", Object.fromEntries(metrics.map((name) => [name, metricTitle(name)])), update),
      selectControl("x", "x-axis", { epoch: "epochs", step: "updates", seconds: "seconds" }, update),
      seeds ? selectControl("band", "band", BANDS, update) : null,
      html("label", {}, html("input", { type: "checkbox", id: "log", checked: state.log, onchange: (event) => { state.log = event.target.checked; update(); } }), "log scale")),
    container, legend(update), html("p", { class: "note" }, note));
  const metric = state.metric;
  chart(container, series((row) => aggregate(row.runs, metric, state.x, state.band)), { name: `${metricTitle(metric)} against ${state.x}`, nameX: metricTitle(state.x), nameY: metricTitle(metric),
    logY: state.log, textY: (tick) => (isFraction(metric) ? `${formatNumber(100 * tick)} %` : formatNumber(tick)), read: (p) => formatPoint(metric, p) });
}

function renderLearningRates(update) {
  if (!setVisible("rates", data.curves.includes("lr"))) return;
  const container = html("div", { class: "chart", id: "rates-chart" });
  const curves = series((row) => aggregate(row.runs, "lr", state.x, "none"));
  const tops = curves.map((curve) => extent(curve.points.map((p) => p[1]))[1]);
  const logY = Math.max(...tops) > 20 * Math.min(...tops);
  sectionBody("rates").replaceChildren(container, legend(update));
  chart(container, curves, { name: `learning rate against ${state.x}`, nameX: metricTitle(state.x), nameY: "learning rate", logY, textY: (tick) => formatNumber(tick), height: 260, read: (p) => formatNumber(p[1]) });
}

function formatPoint(metric, p) {
  const text = formatMetric(metric, p[1]);
  return p[4] > 1 && p[3] > p[2] ? `${text} [${formatMetric(metric, p[2])}, ${formatMetric(metric, p[3])}] of ${p[4]}` : p[4] > 1 ? `${text} of ${p[4]}` : text;
}

function series(points) {
  return shownRows().map((row, i) => ({ row, label: `#${row.rank} ${row.label}`, style: styleOf(i), points: state.hidden.includes(row.id) ? [] : points(row) }));
}

function legend(update) {
  return html("div", { class: "legend" }, ...shownRows().map((row, i) => html("button", { type: "button", "aria-pressed": String(!state.hidden.includes(row.id)),
    onclick: () => {
      const ids = new Set(state.hidden);
      if (ids.has(row.id)) ids.delete(row.id); else ids.add(row.id);
      state.hidden = [...ids];
      update();
    } }, swatch(styleOf(i)), `#${row.rank} ${row.label}`)));
}
