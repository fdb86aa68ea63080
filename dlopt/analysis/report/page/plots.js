// Effects of the keys: sensitivity to the learning rate, importance, parallel coordinates, time to target.

function renderSensitivity() {
  if (!setVisible("sensitivity", data.sensitivity.length > 0)) return;
  const container = html("div", { class: "chart", id: "sensitivity-chart" });
  const curves = data.sensitivity.map((optimizer, i) => ({ label: optimizer.name, style: styleOf(i), marks: true,
    points: optimizer.best.map(([lr, mean, std, count]) => [lr, mean, std === null ? mean : mean - std, std === null ? mean : mean + std, count]) }));
  const tolerance = isFraction(data.by) ? "1 percentage point" : "5 %";
  sectionBody("sensitivity").replaceChildren(container,
    html("div", { class: "legend" }, ...curves.map((curve) => html("span", { class: "swatch" }, swatch(curve.style), curve.label))),
    html("ul", { class: "facts" }, ...data.sensitivity.map((optimizer) => html("li", {}, `good rates for ${optimizer.name}: `, html("b", {}, optimizer.good[0] === optimizer.good[1] ? formatNumber(optimizer.good[0]) : `${formatNumber(optimizer.good[0])} to ${formatNumber(optimizer.good[1])}`)))),
    html("p", { class: "note" }, `Best configuration at each learning rate (others: small dots). Band: ± standard deviation over seeds. Bars: good rates, adjacent to the best and at most ${tolerance} worse (or one standard deviation over seeds, if larger). ×: failed runs. Filters do not apply.`));
  const height = (container.clientWidth < 500 ? 260 : 340) + 14 * curves.length;
  chart(container, curves, { name: "metric against learning rate by optimizer", nameX: "learning rate", nameY: metricTitle(data.by), logX: true, height,
    textY: (tick) => (isFraction(data.by) ? `${formatNumber(100 * tick)} %` : formatNumber(tick)), read: (p) => formatStatistic(data.by, [p[1], p[3] > p[2] ? p[3] - p[1] : null]),
    extra: (root, x, y, o) => {
      const bottom = o.height - o.margin.bottom;
      data.sensitivity.forEach((optimizer, i) => {
        const colour = styleOf(i).colour, line = bottom - 6 - 9 * (data.sensitivity.length - 1 - i);
        root.append(svg("line", { class: "good", x1: x(optimizer.good[0]) - 5, x2: x(optimizer.good[1]) + 5, y1: line, y2: line, stroke: colour, "stroke-width": 6, "stroke-linecap": "round" }));
        for (const [lr, mean] of optimizer.points) root.append(svg("circle", { cx: x(lr), cy: y(mean), r: 2, fill: colour, opacity: 0.5 }));
        for (const lr of optimizer.failed.filter((rate) => x(rate) <= o.width - o.margin.right + 1)) {
          const mark = svg("text", { x: x(lr), y: line - 8, "text-anchor": "middle", "font-weight": 700 }, "×");
          mark.style.fill = colour;
          root.append(mark);
        }
      });
    } });
}

function renderImportance() {
  const importance = data.importance;
  if (!setVisible("importance", Boolean(importance))) return;
  if (importance.missing) return sectionBody("importance").replaceChildren(html("p", { class: "note" }, importance.missing));
  const container = html("div", { class: "chart", id: "importance-chart" });
  sectionBody("importance").replaceChildren(container, html("p", { class: "note" },
    `Fraction of the variance of ${metricTitle(data.by)} over ${importance.configurations} configurations that each key explains alone (functional ANOVA). ` +
    "The rest is interactions of keys. Filters do not apply."));
  const keys = [...importance.keys].sort((a, b) => b[1] - a[1]);
  const width = Math.max(280, container.clientWidth), step = 26, left = Math.min(width * 0.42, 16 + 7.2 * Math.max(...keys.map(([key]) => key.length)));
  const x = linear(0, 1, left, width - 50);
  const root = svg("svg", { viewBox: `0 0 ${width} ${keys.length * step + 30}`, height: keys.length * step + 30, role: "img", "aria-label": "hyperparameter importance" });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) root.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 0, y2: keys.length * step }),
    svg("text", { x: x(tick), y: keys.length * step + 16, "text-anchor": "middle" }, `${100 * tick} %`));
  keys.forEach(([key, alone], i) => {
    const read = (event) => showTooltip(event, key, [["", "main effect", `${(100 * alone).toFixed(1)} %`]]);
    root.append(svg("g", { onpointermove: read, onpointerleave: hideTooltip },
      svg("rect", { x: 0, y: i * step, width, height: step, fill: "#fff", opacity: 0 }),
      svg("rect", { x: left, y: i * step + 4, width: x(alone) - left, height: step - 8, fill: COLOURS[0] }),
      svg("text", { x: left - 6, y: i * step + 17, "text-anchor": "end" }, key)));
  });
  container.replaceChildren(root);
}

// -- parallel coordinates

const brushes = {}; // axis -> [low, high] in 0..1

function makeAxis(name, values) {
  const known = values.filter((value) => value !== undefined && value !== null);
  const [low, high] = extent(known.map((value) => (typeof value === "number" ? value : NaN)));
  if (known.every((value) => typeof value === "number") && low < high) {
    const scale = (low > 0 && high / low >= 20 ? logarithmic : linear)(low, high, 0, 1);
    const distinct = [...new Set(known)].sort((a, b) => a - b);
    const ticks = distinct.length <= 8 ? distinct : [0, 0.25, 0.5, 0.75, 1].map(scale.invert);
    return { name, positionOf: (value) => (value === undefined || value === null ? null : scale(value)), ticks: ticks.map((tick) => [scale(tick), isFraction(name) ? formatMetric(name, tick) : formatNumber(tick)]) };
  }
  const names = [...new Set(values.map(formatValue))].sort();
  const positions = new Map(names.map((value, i) => [value, (i + 0.5) / names.length]));
  return { name, positionOf: (value) => positions.get(formatValue(value)), ticks: names.length > 20 ? [] : [...positions].map(([value, position]) => [position, value]) };
}

function shadeOf(fraction) { // light grey to dark blue: darker is better, also in print
  const stops = [[217, 217, 217], [120, 170, 214], [8, 48, 107]], i = fraction < 0.5 ? 0 : 1, weight = (fraction - i / 2) * 2;
  return `rgb(${stops[i].map((start, k) => Math.round(start + weight * (stops[i + 1][k] - start))).join(",")})`;
}

function renderParallel() {
  const rows = visible.filter((row) => row.metrics[data.by]);
  if (!setVisible("parallel", data.keys.length > 1 && data.rows.filter((row) => row.metrics[data.by]).length > 1)) return;
  const container = html("div", { class: "chart", id: "parallel-chart" });
  sectionBody("parallel").replaceChildren(container, html("p", { class: "note" }, `One line per configuration; darker is better (${metricTitle(data.by)}). Drag along an axis to highlight the lines that cross the range; click the axis to reset.`));
  const list = [...data.keys.slice(0, 9).map((key) => makeAxis(key, rows.map((row) => row.values[key]))), makeAxis(data.by, rows.map((row) => row.metrics[data.by][0]))];
  const available = Math.max(280, container.clientWidth), width = Math.max(available, 118 * list.length), height = 330, top = 34, bottom = height - 14;
  const x = (i) => 14 + (i * (width - 100)) / (list.length - 1), y = (fraction) => bottom - fraction * (bottom - top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, width, role: "img", "aria-label": "parallel coordinates" });
  const lines = rows.map((row, i) => {
    const positions = list.map((axis, k) => axis.positionOf(k < list.length - 1 ? row.values[axis.name] : row.metrics[data.by][0]));
    const points = positions.map((position, k) => (position === null ? null : `${x(k).toFixed(1)} ${y(position).toFixed(1)}`)).filter(Boolean);
    return { row, positions, colour: shadeOf(1 - i / Math.max(rows.length - 1, 1)), path: svg("path", { d: `M${points.join("L")}`, fill: "none" }) };
  });
  const paint = () => {
    for (const line of lines) {
      const kept = list.every((axis, k) => !brushes[axis.name] || (line.positions[k] !== null && line.positions[k] >= brushes[axis.name][0] && line.positions[k] <= brushes[axis.name][1]));
      fill(line.path, { stroke: kept ? line.colour : "#ededed", "stroke-width": kept && line.row === selectedRow() ? 3 : 1.3, class: kept ? "kept" : "" }, []);
    }
  };
  for (const line of [...lines].reverse()) {
    line.path.addEventListener("pointermove", (event) => {
      line.path.setAttribute("stroke-width", 3.5);
      showTooltip(event, `#${line.row.rank} ${line.row.label}`, [["", metricTitle(data.by), formatStatistic(data.by, line.row.metrics[data.by])]]);
    });
    line.path.addEventListener("pointerleave", () => { paint(); hideTooltip(); });
    line.path.addEventListener("click", () => { state.selected = line.row.id; render(); });
    root.append(line.path);
  }
  list.forEach((axis, k) => root.append(parallelAxis(axis, x(k), y, paint, k === 0 ? "start" : "middle")));
  paint();
  container.replaceChildren(html("div", width > available ? { class: "scroll" } : {}, root));
  if (width > available) root.style.width = `${width}px`;
}

function parallelAxis(axis, x, y, paint, anchor) {
  const mark = svg("rect", { x: x - 5, width: 10, fill: COLOURS[1], opacity: 0.3, visibility: "hidden" });
  const showBrush = () => {
    const range = brushes[axis.name];
    fill(mark, range ? { y: y(range[1]), height: y(range[0]) - y(range[1]), visibility: "visible" } : { visibility: "hidden" }, []);
  };
  const handle = svg("rect", { x: x - 12, width: 24, y: y(1) - 6, height: y(0) - y(1) + 12, fill: "#fff", opacity: 0, "data-axis": axis.name });
  const fractionAt = (event) => {
    const box = handle.getBoundingClientRect();
    return 1 - (event.clientY - box.top - 6) / (box.height - 12);
  };
  let start = null;
  handle.addEventListener("pointerdown", (event) => { start = fractionAt(event); handle.setPointerCapture(event.pointerId); });
  handle.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const end = fractionAt(event);
    brushes[axis.name] = [Math.min(start, end), Math.max(start, end)];
    showBrush();
    paint();
  });
  handle.addEventListener("pointerup", (event) => {
    if (start !== null && Math.abs(fractionAt(event) - start) < 0.01) delete brushes[axis.name];
    start = null;
    showBrush();
    paint();
  });
  showBrush();
  handle.style.cursor = "row-resize";
  const labels = axis.ticks.map(([position, text]) => svg("text", { x: x + 7, y: y(position) + 4, stroke: "#fff", "stroke-width": 3, "paint-order": "stroke", "pointer-events": "none" }, text));
  const name = metricTitle(axis.name), full = data.short[axis.name] || name, short = full.length > 20 ? `${full.slice(0, 19)}…` : full;
  return svg("g", {}, svg("line", { class: "axis", x1: x, x2: x, y1: y(1), y2: y(0) }), mark, ...labels, handle,
    svg("text", { x: anchor === "start" ? x - 12 : x, y: 14, "text-anchor": anchor, "font-weight": 600 }, svg("title", {}, name), short));
}

// -- time to target

function firstReached(run, target) {
  const values = run.curve[data.by] || [];
  const i = values.findIndex((value) => value !== null && (data.lower ? value <= target : value >= target));
  return i < 0 ? null : { step: run.curve.step[i], seconds: run.curve.seconds[i] };
}

function meanAndStd(values) {
  const known = values.filter((value) => value !== null && value !== undefined), n = known.length;
  if (!n) return null;
  const mean = known.reduce((a, b) => a + b, 0) / n;
  return [mean, n > 1 ? Math.sqrt(known.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1)) : null, n];
}

function renderTimes(update) {
  if (!setVisible("times", state.target !== null && data.curves.includes(data.by))) return;
  const isPercent = isFraction(data.by), factor = isPercent ? 100 : 1;
  const rows = visible.map((row) => {
    const reachedRuns = row.runs.map((run) => firstReached(run, state.target)).filter(Boolean);
    return { row, count: reachedRuns.length, step: meanAndStd(reachedRuns.map((entry) => entry.step)), seconds: meanAndStd(reachedRuns.map((entry) => entry.seconds)) };
  });
  rows.sort((a, b) => !a.step - !b.step || (a.count < a.row.runs.length) - (b.count < b.row.runs.length) || (a.step ? a.step[0] - b.step[0] : 0) || a.row.rank - b.row.rank);
  const input = html("input", { type: "number", id: "target", step: "any", value: Number((factor * state.target).toPrecision(6)),
    onchange: () => { if (input.value !== "") { state.target = Number(input.value) / factor; update(); } } });
  const reached = rows.filter((entry) => entry.count), longest = { step: Math.max(...reached.map((entry) => entry.step[0])), seconds: Math.max(...reached.map((entry) => (entry.seconds ? entry.seconds[0] : 0))) };
  const bar = (values, name, colour) => html("td", { class: "number" }, !values ? "–" : html("span", { class: "swatch" }, formatStatistic(name === "step" ? "steps" : name, values),
    svg("svg", { width: 90, height: 12, "aria-hidden": "true" }, svg("rect", { y: 1, width: Math.max(1, (88 * values[0]) / longest[name]), height: 10, fill: colour }))));
  const tableRows = rows.slice(0, state.all ? rows.length : 20).map((entry) => html("tr", {},
    html("td", { class: "number" }, String(entry.row.rank)), html("td", { class: "wrap" }, entry.row.label), html("td", { class: "number" }, `${entry.count} of ${entry.row.runs.length}`),
    bar(entry.step, "step", COLOURS[0]), bar(entry.seconds, "seconds", COLOURS[1])));
  sectionBody("times").replaceChildren(
    html("div", { class: "controls" }, html("label", {}, `${metricTitle(data.by)} ${data.lower ? "at most" : "at least"} `, input, isPercent ? " %" : "")),
    html("p", { class: "note" }, `${reached.length} of ${rows.length} configurations reach the target. Mean ± standard deviation over the runs that reach it, at the first evaluated epoch; configurations with runs that do not reach it are listed last.`),
    html("div", { class: "scroll" }, html("table", {}, html("thead", {}, html("tr", {}, ...["#", "configuration", "runs", "updates", "seconds"].map((name, i) => html("th", { class: i === 1 ? "" : "number", scope: "col" }, name)))), html("tbody", {}, ...tableRows))));
}
