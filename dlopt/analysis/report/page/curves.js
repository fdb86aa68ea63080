// Curves: means over seeds with bands, in a chart whose points can be read.

function quantile(degrees) {
  return degrees <= data.t.length ? data.t[degrees - 1] : 1.96 + 2.46 / degrees;
}

function at(points, x) {
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

// [x, mean, low, high, count] where at least half of the runs have the figure.
function aggregate(runs, metric, x, band) {
  const curves = runs.map((run) => run.curve[x].map((each, i) => [each, run.curve[metric] ? run.curve[metric][i] : null])
    .filter(([a, b]) => a !== null && b !== null)).filter((points) => points.length);
  if (!curves.length) return [];
  let grid;
  if (x === "seconds") {
    const [low] = extent(curves.map((points) => points[0][0])), [, high] = extent(curves.map((points) => points.at(-1)[0]));
    grid = curves.length === 1 ? curves[0].map(([each]) => each) : Array.from({ length: 80 }, (_, i) => low + (i / 79) * (high - low));
  } else {
    grid = [...new Set(curves.flatMap((points) => points.map(([each]) => each)))].sort((a, b) => a - b);
  }
  const found = [];
  for (const place of grid) {
    const values = curves.map((points) => at(points, place)).filter((each) => each !== null);
    if (2 * values.length < curves.length) continue;
    const n = values.length, mean = values.reduce((a, b) => a + b, 0) / n;
    const std = n > 1 ? Math.sqrt(values.reduce((sum, each) => sum + (each - mean) ** 2, 0) / (n - 1)) : 0;
    const half = n < 2 || band === "none" ? 0 : band === "std" ? std : (quantile(n - 1) * std) / Math.sqrt(n);
    const [low, high] = band === "range" ? extent(values) : [mean - half, mean + half];
    found.push([place, mean, low, high, n]);
  }
  return found;
}

// A chart with axes and a box of readings. series: {label, style, points: [x, y, low, high, count], marks}
function chart(place, series, options) {
  const width = Math.max(280, place.clientWidth), height = options.height || (width < 500 ? 260 : 340);
  const margin = { left: 62, right: 14, top: 10, bottom: 44 };
  let [x0, x1] = extent(series.flatMap((each) => each.points.map((p) => p[0])));
  let [y0, y1] = extent(series.flatMap((each) => each.points.map((p) => (options.logY && !(p[1] > 0) ? NaN : p[1]))));
  if (!Number.isFinite(x0) || !Number.isFinite(y0)) return place.replaceChildren(make("p", { class: "note" }, "No data yet."));
  if (x0 === x1) [x0, x1] = options.logX ? [x0 / 2, x1 * 2] : [x0 - 0.5, x1 + 0.5];
  if (options.logY) [y0, y1] = [Math.max(y0 / 1.15, y1 * 1e-6), y1 * 1.15];
  else {
    const pad = 0.06 * (y1 - y0) || Math.abs(y0) * 0.1 || 0.1;
    [y0, y1] = [y0 - pad, y1 + pad];
  }
  if (options.logX) [x0, x1] = [x0 / 1.3, x1 * 1.3];
  const x = (options.logX ? logarithmic : linear)(x0, x1, margin.left, width - margin.right);
  const y = (options.logY ? logarithmic : linear)(y0, y1, height - margin.bottom, margin.top);
  const clip = `clip-${place.id}`;
  const root = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.name },
    draw("defs", {}, draw("clipPath", { id: clip }, draw("rect", { x: margin.left, y: margin.top, width: width - margin.left - margin.right, height: height - margin.top - margin.bottom }))));
  axes(root, x, y, { width, height, margin, ...options });
  const inner = draw("g", { "clip-path": `url(#${clip})` });
  const line = (points, of) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(of(p)).toFixed(1)}`).join("");
  const usable = (points) => points.filter((p) => !options.logY || p[1] > 0);
  for (const each of series) {
    const points = usable(each.points), banded = points.filter((p) => p[3] > p[2]);
    if (banded.length > 1) {
      const floor = (p) => (options.logY ? Math.max(p[2], y0) : p[2]);
      const back = [...banded].reverse().map((p) => `L${x(p[0]).toFixed(1)} ${y(floor(p)).toFixed(1)}`).join("");
      inner.append(draw("path", { d: `${line(banded, (p) => p[3])}${back}Z`, fill: each.style.colour, opacity: 0.15 }));
    }
  }
  const paths = series.map((each) => {
    const points = usable(each.points);
    const path = draw("path", { d: line(points, (p) => p[1]), fill: "none", stroke: each.style.colour, "stroke-width": 2, "stroke-dasharray": each.style.dash });
    inner.append(path);
    if (each.marks || points.length === 1) for (const p of points) inner.append(draw("circle", { cx: x(p[0]), cy: y(p[1]), r: 4, fill: each.style.colour }));
    return path;
  });
  root.append(inner);
  if (options.extra) options.extra(root, x, y, { width, height, margin });
  reading(root, series, paths, x, y, { width, height, margin, ...options });
  place.replaceChildren(root);
}

function axes(root, x, y, o) {
  const bottom = o.height - o.margin.bottom, right = o.width - o.margin.right;
  for (const tick of y.ticks(5)) {
    root.append(draw("line", { class: "grid", x1: o.margin.left, x2: right, y1: y(tick), y2: y(tick) }),
      draw("text", { x: o.margin.left - 6, y: y(tick) + 4, "text-anchor": "end" }, o.textY(tick)));
  }
  for (const tick of x.ticks(o.width < 500 ? 4 : 8)) {
    root.append(draw("line", { class: "grid", x1: x(tick), x2: x(tick), y1: o.margin.top, y2: bottom }),
      draw("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, digits(tick)));
  }
  root.append(draw("line", { class: "axis", x1: o.margin.left, x2: right, y1: bottom, y2: bottom }),
    draw("line", { class: "axis", x1: o.margin.left, x2: o.margin.left, y1: o.margin.top, y2: bottom }),
    draw("text", { x: (o.margin.left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, o.nameX),
    draw("text", { transform: `translate(13 ${(o.margin.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, o.nameY));
}

// The pointer's nearest x: all series there in the box, the nearest of them thick.
function reading(root, series, paths, x, y, o) {
  const rule = draw("line", { class: "axis", y1: o.margin.top, y2: o.height - o.margin.bottom, "stroke-dasharray": "2 3", visibility: "hidden" });
  root.append(rule);
  const xs = [...new Set(series.flatMap((each) => each.points.map((p) => p[0])))].sort((a, b) => a - b);
  const move = (event) => {
    const box = root.getBoundingClientRect(), scale = o.width / box.width;
    const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
    const at = xs.reduce((best, each) => (Math.abs(x(each) - px) < Math.abs(x(best) - px) ? each : best), xs[0]);
    rule.setAttribute("x1", x(at));
    rule.setAttribute("x2", x(at));
    rule.setAttribute("visibility", "visible");
    const found = series.map((each, i) => [i, each, near(each.points, at)]).filter(([, , p]) => p && (!o.logY || p[1] > 0));
    found.sort(([, , a], [, , b]) => b[1] - a[1]);
    const closest = found.reduce((best, each) => (best && Math.abs(y(best[2][1]) - py) <= Math.abs(y(each[2][1]) - py) ? best : each), null);
    paths.forEach((path, i) => path.setAttribute("stroke-width", closest && closest[0] === i ? 3.5 : 2));
    tell(event, `${o.nameX} ${o.textX ? o.textX(at) : digits(at)}`, found.map(([i, each, p]) => [swatch(each.style),
      closest && closest[0] === i ? make("b", {}, each.label) : each.label, o.read(p)]));
  };
  const leave = () => {
    hush();
    rule.setAttribute("visibility", "hidden");
    paths.forEach((path) => path.setAttribute("stroke-width", 2));
  };
  root.addEventListener("pointermove", move);
  root.addEventListener("pointerdown", move);
  root.addEventListener("pointerleave", leave);
}

// The point at x; between a curve's points there is none to be read, beyond half a step.
function near(points, x) {
  let best = null, gap = Infinity;
  points.forEach((p, i) => {
    const distance = Math.abs(p[0] - x);
    const step = Math.max(i ? p[0] - points[i - 1][0] : 0, i + 1 < points.length ? points[i + 1][0] - p[0] : 0);
    if (distance < gap && distance <= step / 2) [best, gap] = [p, distance];
    if (distance === 0) [best, gap] = [p, 0];
  });
  return best;
}

// -- the two sections of curves

const BANDS = { confidence: "95 % interval of the mean", std: "± standard deviation", range: "lowest to highest", none: "none" };

function bandDefault() {
  const most = Math.max(...data.rows.map((row) => row.runs.length));
  return most > 2 ? "confidence" : "range"; // the interval of two runs is 13 times as wide as they are apart from their mean
}

function choice(name, label, options, update) {
  return make("label", {}, `${label} `, make("select", { "data-choice": name, onchange: (event) => { state[name] = event.target.value; update(); } },
    ...Object.entries(options).map(([key, text]) => make("option", { value: key, selected: state[name] === key }, text))));
}

function curves(update) {
  const metrics = data.curves.filter((name) => name !== "lr");
  if (!show("curves", metrics.length > 0)) return;
  if (!metrics.includes(state.metric)) state.metric = metrics.includes(data.by) ? data.by : metrics[0];
  if (!BANDS[state.band]) state.band = bandDefault();
  const seeds = data.rows.some((row) => row.runs.length > 1);
  const place = make("div", { class: "chart", id: "curves-chart" });
  const note = seeds ? `Means over seeds, where at least half of a configuration's runs have come so far; the band: ${BANDS[state.band]}.` : "";
  body("curves").replaceChildren(
    make("div", { class: "controls" },
      choice("metric", "figure", Object.fromEntries(metrics.map((name) => [name, title(name)])), update),
      choice("x", "against", { epoch: "epochs", step: "updates", seconds: "seconds" }, update),
      seeds ? choice("band", "band", BANDS, update) : null,
      make("label", {}, make("input", { type: "checkbox", id: "log", checked: state.log, onchange: (event) => { state.log = event.target.checked; update(); } }), "logarithmic")),
    place, legend(update), make("p", { class: "note" }, note));
  const metric = state.metric;
  chart(place, series((row) => aggregate(row.runs, metric, state.x, state.band)), { name: `${title(metric)} against ${state.x}`, nameX: title(state.x), nameY: title(metric),
    logY: state.log, textY: (tick) => (isShare(metric) ? `${digits(100 * tick)} %` : digits(tick)), read: (p) => reads(metric, p) });
}

function rates(update) {
  if (!show("rates", data.curves.includes("lr"))) return;
  const place = make("div", { class: "chart", id: "rates-chart" });
  const list = series((row) => aggregate(row.runs, "lr", state.x, "none"));
  const tops = list.map((each) => extent(each.points.map((p) => p[1]))[1]);
  const logY = Math.max(...tops) > 20 * Math.min(...tops);
  body("rates").replaceChildren(place, legend(update));
  chart(place, list, { name: `learning rate against ${state.x}`, nameX: title(state.x), nameY: "learning rate", logY, textY: (tick) => digits(tick), height: 260, read: (p) => digits(p[1]) });
}

function reads(metric, p) {
  const text = figure(metric, p[1]);
  return p[4] > 1 && p[3] > p[2] ? `${text} [${figure(metric, p[2])}, ${figure(metric, p[3])}] of ${p[4]}` : p[4] > 1 ? `${text} of ${p[4]}` : text;
}

function series(points) {
  return drawn().map((row, i) => ({ row, label: `#${row.rank} ${row.label}`, style: styleOf(i), points: state.hidden.includes(row.id) ? [] : points(row) }));
}

function legend(update) {
  return make("div", { class: "legend" }, ...drawn().map((row, i) => make("button", { type: "button", "aria-pressed": String(!state.hidden.includes(row.id)),
    onclick: () => {
      const ids = new Set(state.hidden);
      if (ids.has(row.id)) ids.delete(row.id); else ids.add(row.id);
      state.hidden = [...ids];
      update();
    } }, swatch(styleOf(i)), `#${row.rank} ${row.label}`)));
}
