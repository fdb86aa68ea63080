// Sections with line charts: learning curves, learning rates, learning-rate sensitivity.

const BANDS = { range: "lowest to highest run", std: "± standard deviation", error: "± standard error", confidence: "95 % confidence interval", none: "none" };

function studentT(degrees) {
  return degrees <= data.t.length ? data.t[degrees - 1] : 1.96 + 2.46 / degrees;
}

// Returns the value at x between two of the sorted points [x, value], or null outside.
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

// Returns [x, mean, low, high, count] at every epoch that at least half of the runs reach (see `band` in table.py).
function aggregate(runs, metric, x, band) {
  const curves = runs.map(({ curve }) => {
    const kept = curve.epoch.map((_, i) => i).filter((i) => curve[metric] && curve[metric][i] !== null && curve[x][i] !== null);
    const pairs = (name) => kept.map((i) => [curve.epoch[i], curve[name][i]]);
    return kept.length ? { at: pairs(x), values: pairs(metric) } : null;
  }).filter(Boolean);
  const epochs = [...new Set(curves.flatMap((curve) => curve.values.map(([epoch]) => epoch)))].sort((a, b) => a - b);
  const result = [];
  let position = 0, before = curves.map(() => 0);
  for (const epoch of epochs) {
    const values = curves.map((curve) => interpolate(curve.values, epoch)).filter((value) => value !== null);
    if (2 * values.length < curves.length) continue;
    const at = curves.map((curve) => interpolate(curve.at, epoch));
    const widths = at.map((value, i) => (value === null || before[i] === null ? null : value - before[i])).filter((value) => value !== null);
    if (widths.length) position += widths.reduce((a, b) => a + b, 0) / widths.length;
    before = at;
    const n = values.length, [mean, std] = meanAndStd(values);
    const half = n < 2 ? 0 : { std, error: std / Math.sqrt(n), confidence: (studentT(n - 1) * std) / Math.sqrt(n) }[band] || 0;
    const [low, high] = band === "range" ? extent(values) : [mean - half, mean + half];
    result.push([position, mean, low, high, n]);
  }
  return result;
}

function meanAndStd(values) {
  const known = values.filter((value) => value !== null && value !== undefined), n = known.length;
  if (!n) return null;
  const mean = known.reduce((a, b) => a + b, 0) / n;
  return [mean, n > 1 ? Math.sqrt(known.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1)) : null, n];
}

// -- sections

function selectControl(name, label, options, update) {
  return html("label", {}, `${label} `, html("select", { "data-choice": name, onchange: (event) => { state[name] = event.target.value; update(); } },
    ...Object.entries(options).map(([key, text]) => html("option", { value: key, selected: state[name] === key }, text))));
}

function renderCurves(update) {
  const metrics = data.curves.filter((name) => name !== "lr");
  if (!setVisible("curves", metrics.length > 0)) return;
  if (!metrics.includes(state.metric)) state.metric = metrics.includes(data.by) ? data.by : metrics[0];
  if (!BANDS[state.band]) state.band = data.spread;
  const { metric, x, band } = state, seeds = data.rows.some((row) => row.runs.length > 1);
  const container = html("div", { class: "chart", id: "curves-chart" });
  const note = seeds ? `Mean over seeds, up to the epoch that at least half of the runs reach. Band: ${BANDS[band]}. ` : "";
  sectionBody("curves").replaceChildren(
    html("div", { class: "controls" },
      selectControl("metric", "metric", Object.fromEntries(metrics.map((name) => [name, metricTitle(name)])), update),
      selectControl("x", "x-axis", { epoch: "epochs", step: "updates", seconds: "seconds" }, update),
      seeds ? selectControl("band", "band", BANDS, update) : null,
      html("label", {}, html("input", { type: "checkbox", id: "log", checked: state.log, onchange: (event) => { state.log = event.target.checked; update(); } }), "log scale")),
    container, legend(update), html("p", { class: "note" }, note, html("span", { class: "screen" }, "Drag to zoom; double-click to reset.")));
  drawChart(container, curveLines((row) => aggregate(row.distinct, metric, x, band)), { id: "curves", key: `${metric} ${x} ${state.log}`,
    name: `${metricTitle(metric)} against ${metricTitle(x)}`, nameX: metricTitle(x), nameY: metricTitle(metric), logY: state.log, integers: x !== "seconds",
    textY: (tick) => formatTick(metric, tick), read: (p) => formatPoint(metric, p) });
}

function renderLearningRates(update) {
  if (!setVisible("rates", data.curves.includes("lr"))) return;
  const container = html("div", { class: "chart", id: "rates-chart" }), x = state.x;
  const lines = curveLines((row) => aggregate(row.distinct, "lr", x, "none"));
  const tops = lines.filter((line) => line.points.length).map((line) => extent(line.points.map((p) => p[1]))[1]);
  sectionBody("rates").replaceChildren(container, legend(update));
  drawChart(container, lines, { id: "rates", key: x, name: `learning rate against ${metricTitle(x)}`, nameX: metricTitle(x), nameY: "learning rate",
    logY: Math.max(...tops) > 20 * Math.min(...tops), integers: x !== "seconds", height: 260, textY: (tick) => formatNumber(tick), read: (p) => formatNumber(p[1]) });
}

function formatPoint(metric, p) {
  const text = formatMetric(metric, p[1]);
  return p[4] > 1 && p[3] > p[2] ? `${text} [${formatMetric(metric, p[2])}, ${formatMetric(metric, p[3])}] of ${p[4]}` : p[4] > 1 ? `${text} of ${p[4]}` : text;
}

function curveLines(points) {
  return plottedRows().filter(({ row }) => !state.hidden.includes(row.id)).map(({ row, slot }) => ({ label: `#${row.rank} ${row.label}`, style: styleOf(slot), points: points(row) }));
}

function legend(update) {
  return html("div", { class: "legend" }, ...plottedRows().map(({ row, slot }) => html("button", { type: "button", "aria-pressed": String(!state.hidden.includes(row.id)),
    onclick: () => {
      const ids = new Set(state.hidden);
      if (!ids.delete(row.id)) ids.add(row.id);
      state.hidden = [...ids];
      update();
    } }, swatch(styleOf(slot)), `#${row.rank} ${row.label}`)));
}

// -- learning-rate sensitivity

// Returns the style of each optimizer: that of its best configuration in the leaderboard, or a free one.
function optimizerStyles() {
  const plotted = plottedRows();
  let free = Math.max(SHOWN, ...plotted.map(({ slot }) => slot + 1));
  return data.sensitivity.map((optimizer) => {
    const best = data.rows[Math.min(...optimizer.points.map(([, , row]) => row))];
    const found = plotted.find(({ row }) => row === best);
    return styleOf(found ? found.slot : free++);
  });
}

function renderSensitivity() {
  if (!setVisible("sensitivity", data.sensitivity.length > 0)) return;
  const container = html("div", { class: "chart", id: "sensitivity-chart" }), styles = optimizerStyles();
  const lines = data.sensitivity.map((optimizer, i) => ({ label: optimizer.name, style: styles[i], marks: true,
    points: optimizer.best.map(([lr, mean, std, count]) => [lr, mean, mean - (std || 0), mean + (std || 0), count]) }));
  const [low, high] = extent(data.sensitivity.flatMap((optimizer) => optimizer.points.map(([, mean]) => mean)));
  const range = ({ good: [low, high] }) => (low === high ? formatNumber(low) : `${formatNumber(low)} to ${formatNumber(high)}`);
  sectionBody("sensitivity").replaceChildren(container,
    html("div", { class: "legend" }, ...lines.map((line, i) => html("span", { class: "swatch" }, swatch(line.style), `${line.label}, good rates: `, html("b", {}, range(data.sensitivity[i]))))),
    html("p", { class: "note" }, `Best configuration at each learning rate (others: small dots), in the colour of the optimizer's best configuration. Band: ± standard deviation over seeds. Bars: good rates, adjacent to the best and at most ${data.tolerance} worse (or one standard deviation over seeds, if larger). ×: failed runs. Filters do not apply.`));
  drawChart(container, lines, { id: "sensitivity", key: "", name: `${metricTitle(data.by)} against learning rate by optimizer`, nameX: "learning rate", nameY: metricTitle(data.by),
    logX: true, logY: data.lower && low > 0 && high > 100 * low, more: data.sensitivity.flatMap((optimizer) => optimizer.failed), footer: 0.6 * lines.length + 0.6, height: 340 + 14 * lines.length, textY: (tick) => formatTick(data.by, tick), read: (p) => formatStatistic(data.by, [p[1], p[3] > p[2] ? p[3] - p[1] : null]),
    extra: (u, scale) => drawRates(u, scale * devicePixelRatio, styles) });
}

// Draws what is not a line: all configurations, the ranges of good rates, failed runs.
function drawRates(u, scale, styles) {
  const { left, top, width, height } = u.bbox, context = u.ctx, x = (lr) => u.valToPos(lr, "x", true);
  context.save();
  context.beginPath();
  context.rect(left, top, width, height);
  context.clip();
  context.lineCap = "round";
  context.lineWidth = 6 * scale;
  context.font = `${14 * scale}px sans-serif`;
  context.textAlign = "center";
  data.sensitivity.forEach((optimizer, i) => {
    const y = top + height - (8 + 10 * (data.sensitivity.length - 1 - i)) * scale;
    context.fillStyle = context.strokeStyle = colourOf(styles[i].colour);
    context.globalAlpha = 0.5;
    for (const [lr, mean] of optimizer.points) {
      context.beginPath();
      context.arc(x(lr), u.valToPos(mean, "y", true), 2.5 * scale, 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
    context.beginPath();
    context.moveTo(x(optimizer.good[0]) - 3 * scale, y);
    context.lineTo(x(optimizer.good[1]) + 3 * scale, y);
    context.stroke();
    for (const lr of optimizer.failed) context.fillText("×", x(lr), y + 5 * scale);
  });
  context.restore();
}
