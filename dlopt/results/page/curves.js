// Sections with line charts: learning curves, learning rates, learning-rate sensitivity.

// Returns the points [x, mean, low, high, count] of a row's curve.
function curvePoints(row, metric, x, band) {
  const curve = row.curves[metric];
  if (!curve || !curve.x[x]) return [];
  const [low, high] = curve.spreads[band] || [curve.mean, curve.mean];
  return curve.mean.map((mean, i) => [curve.x[x][i], mean, low[i], high[i], curve.count[i]]);
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
  if (!data.spreads[state.band]) state.band = data.spread;
  const { metric, x, band } = state, seeds = data.repeated;
  const container = html("div", { class: "chart", id: "curves-chart" });
  const note = seeds ? `Mean over seeds, up to the epoch that at least half of the runs reach. Band: ${data.spreads[band]}. ` : "";
  sectionBody("curves").replaceChildren(
    html("div", { class: "controls" },
      selectControl("metric", "metric", Object.fromEntries(metrics.map((name) => [name, data.titles[name]])), update),
      selectControl("x", "x-axis", { epoch: "epochs", step: "updates", seconds: "seconds" }, update),
      seeds ? selectControl("band", "band", data.spreads, update) : null,
      html("label", {}, html("input", { type: "checkbox", id: "log", checked: state.log, onchange: (event) => { state.log = event.target.checked; update(); } }), "log scale")),
    container, legend(update), html("p", { class: "note" }, note, html("span", { class: "screen" }, "Drag to zoom; double-click to reset.")));
  drawChart(container, curveLines((row) => curvePoints(row, metric, x, band)), { id: "curves", key: `${metric} ${x} ${state.log}`,
    name: `${data.titles[metric]} against ${AXES[x]}`, nameX: AXES[x], nameY: data.titles[metric], logY: state.log, integers: x !== "seconds",
    textY: (tick) => formatTick(metric, tick), read: (p) => formatPoint(metric, p) });
}

function renderLearningRates(update) {
  if (!setVisible("rates", data.curves.includes("lr"))) return;
  const container = html("div", { class: "chart", id: "rates-chart" }), x = state.x;
  const lines = curveLines((row) => curvePoints(row, "lr", x, "none"));
  const tops = lines.filter((line) => line.points.length).map((line) => extent(line.points.map((p) => p[1]))[1]);
  sectionBody("rates").replaceChildren(container, legend(update));
  drawChart(container, lines, { id: "rates", key: x, name: `learning rate against ${AXES[x]}`, nameX: AXES[x], nameY: "learning rate",
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
  return data.sensitivity.optimizers.map((optimizer) => {
    const found = plotted.find(({ row }) => row === data.rows[optimizer.row]);
    return styleOf(found ? found.slot : free++);
  });
}

function renderSensitivity() {
  const { optimizers, log } = data.sensitivity;
  if (!setVisible("sensitivity", optimizers.length > 0)) return;
  const container = html("div", { class: "chart", id: "sensitivity-chart" }), styles = optimizerStyles(), title = data.titles[data.by];
  const lines = optimizers.map((optimizer, i) => ({ label: optimizer.name, style: styles[i], marks: true, points: optimizer.best }));
  sectionBody("sensitivity").replaceChildren(container,
    html("div", { class: "legend" }, ...lines.map((line, i) => html("span", { class: "swatch" }, swatch(line.style), `${line.label}, good rates: `, html("b", {}, optimizers[i].good_text)))),
    html("p", { class: "note" }, `Best configuration at each learning rate (others: small dots), in the colour of the optimizer's best configuration. Band: ± standard deviation over seeds. Bars: good rates, adjacent to the best and at most ${data.tolerance} worse (or one standard deviation over seeds, if larger). ×: failed runs. Filters do not apply.`));
  drawChart(container, lines, { id: "sensitivity", key: "", name: `${title} against learning rate by optimizer`, nameX: "learning rate", nameY: title,
    logX: true, logY: log, more: optimizers.flatMap((optimizer) => optimizer.failed), footer: 0.6 * lines.length + 0.6, height: 340 + 14 * lines.length, textY: (tick) => formatTick(data.by, tick), read: (p) => p[5],
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
  data.sensitivity.optimizers.forEach((optimizer, i) => {
    const y = top + height - (8 + 10 * (data.sensitivity.optimizers.length - 1 - i)) * scale;
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
