// Sections with line charts: learning curves, learning rates, learning-rate sensitivity.

const MOST_SINGLES = 120; // single runs in a chart
const MOST_TICKS = 12; // learning rates that are ticks

// Returns the lines to plot: the groups of the table, or the checked configurations.
function plottedLines() {
  const lines = state.group ? groups().map((group, i) => ({ id: group.value, label: `${state.group}=${group.value}`,
    runs: group.rows.flatMap((row) => row.runs), style: state.colour === state.group ? styleOf(colourIndex(state.group).get(group.value)) : styleOf(i) }))
    : plottedRows().map(({ row, style }) => ({ id: row.id, label: `#${row.cells.rank[1]} ${row.label}`, runs: row.runs, style }));
  return lines.map((line) => ({ ...line, runs: line.runs.filter((run) => run.distinct) }));
}

function linesOf(metric, axis) {
  const points = (runs) => smoothed(averageCurve(runs, metric, axis, state.band), metric === "lr" ? 0 : state.smooth);
  const shown = plottedLines().filter((line) => !state.hidden.includes(line.id));
  if (!state.singles || metric === "lr") return shown.map((line) => ({ ...line, points: points(line.runs) }));
  const singles = shown.flatMap((line) => line.runs.map((run) => ({ ...line, label: `${line.label} seed ${run.seed}`, points: points([run]) })));
  return singles.slice(0, MOST_SINGLES);
}

// Returns the axes on which there are curves, with their titles.
function curveAxes() {
  const known = new Set(data.rows.flatMap((row) => row.runs.flatMap((run) => run.x.flatMap(Object.keys))));
  return Object.fromEntries(Object.entries({ epoch: "epochs", step: "updates", seconds: "seconds" }).filter(([axis]) => known.has(axis)));
}

function axisControls(draw, update) {
  const text = html("output", {}, state.smooth.toFixed(2));
  return [selectControl("x", "x-axis", curveAxes(), update),
    html("label", {}, "smoothing ", html("input", { type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: state.smooth,
      oninput: (event) => {
        state.smooth = Number(event.target.value);
        text.textContent = state.smooth.toFixed(2);
        draw();
        saveState();
      } }), text),
    checkControl("log", "log scale", update)];
}

function renderCurves(update) {
  const metrics = data.curves.filter((name) => name !== "lr");
  if (!setVisible("curves", metrics.length > 0)) return;
  if (!metrics.includes(state.metric)) state.metric = metrics.includes(data.by) ? data.by : metrics[0];
  const { metric, x } = state, container = html("div", { class: "chart", id: "curves-chart" });
  const isAveraged = data.repeated || state.group;
  const draw = () => drawChart(container, linesOf(metric, x), { id: "curves", key: `${metric} ${x} ${state.log}`,
    name: `${data.titles[metric]} against ${AXES[x]}`, nameX: AXES[x], nameY: data.titles[metric], logY: state.log, integers: x !== "seconds",
    textY: (tick) => formatTick(metric, tick), read: (p) => formatPoint(metric, p) });
  sectionBody("curves").replaceChildren(
    html("div", { class: "controls" },
      selectControl("metric", "metric", Object.fromEntries(metrics.map((name) => [name, data.titles[name]])), update),
      ...axisControls(draw, update),
      isAveraged ? checkControl("singles", "single runs", update) : null,
      isAveraged && !state.singles ? selectControl("band", "band", data.spreads, update) : null),
    container, legend(update), html("p", { class: "note" }, curvesNote(isAveraged), coincidence(linesOf(metric, x)), html("span", { class: "screen" }, "Drag to zoom; double-click to reset.")));
  draw();
}

function curvesNote(isAveraged) {
  const runs = state.singles ? `Single runs, at most ${MOST_SINGLES}. ` : isAveraged
    ? `Mean over ${state.group ? "the runs of each group" : "seeds"}, up to the epoch that at least half of the runs reach. Band: ${data.spreads[state.band]}. ` : "";
  return `${runs}Smoothing: exponential moving average; the raw curve stays faint. `;
}

// Names the lines that hide each other.
function coincidence(lines) {
  const equal = Map.groupBy(lines.filter((line) => line.points.length), (line) => JSON.stringify(line.points.map((p) => p.slice(0, 2))));
  const names = [...equal.values()].filter((each) => each.length > 1).map((each) => each.map((line) => line.label).join(", "));
  return names.length ? `Curves that coincide: ${names.join("; ")}. ` : "";
}

function renderLearningRates(update) {
  if (!setVisible("rates", data.curves.includes("lr"))) return;
  const container = html("div", { class: "chart", id: "rates-chart" }), x = state.x, lines = linesOf("lr", x);
  const tops = lines.filter((line) => line.points.length).map((line) => extent(line.points.map((p) => p[1]))[1]);
  sectionBody("rates").replaceChildren(container, legend(update), html("p", { class: "note" }, coincidence(lines)));
  drawChart(container, lines, { id: "rates", key: x, name: `learning rate against ${AXES[x]}`, nameX: AXES[x], nameY: "learning rate",
    logY: Math.max(...tops) > 20 * Math.min(...tops), integers: x !== "seconds", height: 260, textY: (tick) => formatNumber(tick), read: (p) => formatNumber(p[1]) });
}

function formatPoint(metric, p) {
  const band = p[4] > 1 && p[3] > p[2] ? ` [${formatMetric(metric, p[2])}, ${formatMetric(metric, p[3])}]` : "";
  return `${formatMetric(metric, p[1])}${band}${p[4] > 1 ? ` of ${p[4]}` : ""}${p.length > 5 ? ` (raw ${formatMetric(metric, p[5])})` : ""}`;
}

function legend(update) {
  return html("div", { class: "legend" }, ...plottedLines().map((line) => html("button", { type: "button", "aria-pressed": String(!state.hidden.includes(line.id)),
    onclick: () => {
      const ids = new Set(state.hidden);
      if (!ids.delete(line.id)) ids.add(line.id);
      state.hidden = [...ids];
      update();
    } }, swatch(line.style), line.label)));
}

// -- learning-rate sensitivity

// Returns the style of each optimizer: that of its best configuration, or a free one.
function optimizerStyles() {
  let free = Math.max(SHOWN, ...plottedRows().map(({ slot }) => slot + 1));
  return data.sensitivity.optimizers.map((optimizer) => styleOfRow(data.rows[optimizer.row]) || styleOf(free++));
}

function renderSensitivity() {
  const { optimizers, log } = data.sensitivity;
  if (!setVisible("sensitivity", optimizers.length > 0)) return;
  const container = html("div", { class: "chart", id: "sensitivity-chart" }), styles = optimizerStyles(), title = data.titles[data.by];
  const rates = [...new Set(optimizers.flatMap(({ points, failed }) => [...points.map(([lr]) => lr), ...failed]))].sort((a, b) => a - b);
  const lines = optimizers.map((optimizer, i) => ({ label: optimizer.name, style: styles[i], marks: true, points: optimizer.best.map((p) => p.slice(0, 5)) }));
  sectionBody("sensitivity").replaceChildren(container,
    html("div", { class: "legend" }, ...lines.map((line, i) => html("span", { class: "swatch" }, swatch(line.style), `${line.label}, good rates: `, html("b", {}, optimizers[i].good_text)))),
    html("p", { class: "note" }, `Best configuration at each learning rate (others: small dots). Band: ± standard deviation over seeds. Bars below the axis: good rates, adjacent to the best and at most ${data.tolerance} worse (or one standard deviation over seeds, if larger). ×: failed runs. Filters do not apply.`));
  drawChart(container, lines, { id: "sensitivity", key: "", name: `${title} against learning rate by optimizer`, nameX: "learning rate", nameY: title,
    logX: true, logY: log, more: optimizers.flatMap((optimizer) => optimizer.failed), lanes: 10 * lines.length + 4, height: 340 + 10 * lines.length,
    ticks: rates.length > MOST_TICKS ? [] : rates,
    textY: (tick) => formatTick(data.by, tick), read: (p) => formatSpread(data.by, p[1], p[4] > 1 ? p[3] - p[1] : null),
    extra: (x, y) => optimizers.flatMap(({ points }, i) => points.map(([lr, middle]) => svg("circle", { cx: x(lr), cy: y(middle), r: 2.5, fill: `var(${styles[i].colour})`, "fill-opacity": 0.5 }))),
    below: (x, bottom) => optimizers.flatMap((optimizer, i) => goodRates(optimizer, `var(${styles[i].colour})`, x, bottom + 9 + 10 * i)) });
}

// Returns what is below the axis: the range of good rates, failed runs.
function goodRates(optimizer, colour, x, y) {
  return [svg("line", { x1: x(optimizer.good[0]) - 3, x2: x(optimizer.good[1]) + 3, y1: y, y2: y, stroke: colour, "stroke-width": 6 }),
    ...optimizer.failed.map((lr) => svg("text", { x: x(lr), y: y + 5, "text-anchor": "middle", fill: colour }, "×"))];
}
