// Effects of the keys: importance, parallel coordinates, time to target.

// Returns a bar of a fraction of 100 pixels.
function bar(fraction, colour, isPale = false) {
  return svg("svg", { width: 104, height: 12, "aria-hidden": "true" },
    svg("rect", { y: 1, width: Math.max(1, 102 * fraction), height: 10, fill: `var(--c${colour})`, opacity: isPale ? 0.4 : null }));
}

function renderImportance() {
  const importance = data.importance;
  if (!setVisible("importance", Boolean(importance))) return;
  if (importance.missing) return sectionBody("importance").replaceChildren(html("p", { class: "note" }, importance.missing));
  const rows = [...importance.keys].sort((a, b) => b[1] - a[1]).map(([key, alone]) => html("tr", {},
    html("td", { class: "wrap" }, key), html("td", { class: "number" }, `${(100 * alone).toFixed(1)} %`), html("td", {}, bar(alone, 0))));
  sectionBody("importance").replaceChildren(html("div", { class: "narrow" }, tableOf([["key"], ["main effect", "number"], [""]], rows)), html("p", { class: "note" },
    `Fraction of the variance of ${metricTitle(data.by)} over ${importance.configurations} configurations that each key explains alone (functional ANOVA). ` +
    `The rest is interactions of keys. The model explains ${(100 * importance.explained).toFixed(0)} % of the variance of held-out configurations. Filters do not apply.`));
}

// -- parallel coordinates

const brushes = {}; // axis -> [low, high] in 0..1

function makeAxis(name, values) {
  const known = values.filter((value) => value !== undefined && value !== null);
  const [low, high] = extent(known.map((value) => (typeof value === "number" ? value : NaN)));
  if (known.every((value) => typeof value === "number") && low < high) {
    const isLog = low > 0 && high / low >= 20, scale = (value) => (isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
    const distinct = [...new Set(known)].sort((a, b) => a - b), quarters = [0, 0.25, 0.5, 0.75, 1];
    const ticks = distinct.length <= 8 ? distinct : quarters.map((part) => (isLog ? low * (high / low) ** part : low + part * (high - low)));
    return { name, positionOf: (value) => (value === undefined || value === null ? null : scale(value)), ticks: apart(ticks.map((tick) => [scale(tick), isFraction(name) ? formatMetric(name, tick) : formatNumber(tick)])) };
  }
  const names = [...new Set(values.map(formatValue))].sort();
  const positions = new Map(names.map((value, i) => [value, (i + 0.5) / names.length]));
  return { name, positionOf: (value) => positions.get(formatValue(value)), ticks: names.length > 20 ? [] : [...positions].map(([value, position]) => [position, value]) };
}

// Returns the ticks from the highest down whose labels do not overlap.
function apart(ticks) {
  const kept = [];
  for (const tick of [...ticks].reverse()) if (!kept.length || kept.at(-1)[0] - tick[0] > 0.045) kept.push(tick);
  return kept;
}

function shadeOf(fraction) { // faint to strong: better is stronger, also in print
  return `color-mix(in srgb, var(--strong) ${Math.round(100 * fraction ** 2)}%, var(--faint))`;
}

function renderParallel() {
  const rows = visible.filter((row) => row.metrics[data.by]);
  if (!setVisible("parallel", data.keys.length > 1 && data.rows.filter((row) => row.metrics[data.by]).length > 1)) return;
  const container = html("div", { class: "chart", id: "parallel-chart" });
  sectionBody("parallel").replaceChildren(container, html("p", { class: "note" }, `One line per configuration; stronger is better (${metricTitle(data.by)}). Drag along an axis to highlight the lines that cross the range; click the axis to reset.`));
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
      fill(line.path, { stroke: kept ? line.colour : "var(--grid)", "stroke-width": kept && line.row === selectedRow() ? 3 : 1.3, class: kept ? "kept" : "" }, []);
    }
  };
  for (const line of [...lines].reverse()) {
    line.path.addEventListener("pointermove", (event) => {
      line.path.setAttribute("stroke-width", 3.5);
      showTooltip(event.clientX, event.clientY, `#${line.row.rank} ${line.row.label}`, [["", metricTitle(data.by), formatStatistic(data.by, line.row.metrics[data.by])]]);
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
  const mark = svg("rect", { x: x - 5, width: 10, fill: "var(--c1)", opacity: 0.3, visibility: "hidden" });
  const showBrush = () => {
    const range = brushes[axis.name];
    fill(mark, range ? { y: y(range[1]), height: y(range[0]) - y(range[1]), visibility: "visible" } : { visibility: "hidden" }, []);
  };
  const handle = svg("rect", { x: x - 12, width: 24, y: y(1) - 6, height: y(0) - y(1) + 12, fill: "var(--paper)", opacity: 0, "data-axis": axis.name });
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
  const labels = axis.ticks.map(([position, text]) => svg("text", { x: x + 7, y: y(position) + 4, stroke: "var(--paper)", "stroke-width": 3, "paint-order": "stroke", "pointer-events": "none" }, text));
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

// Ranks by the share of runs that reach the target, then by mean updates (see `fastest` in table.py).
function timesToTarget() {
  const entries = visible.map((row) => {
    const ended = row.distinct.filter((run) => !["running", "interrupted", "unfinished"].includes(run.status));
    const reached = ended.map((run) => firstReached(run, state.target)).filter(Boolean);
    return { row, runs: ended.length, share: reached.length / ended.length || 0, count: reached.length, step: meanAndStd(reached.map((entry) => entry.step)), seconds: meanAndStd(reached.map((entry) => entry.seconds)) };
  });
  return entries.sort((a, b) => b.share - a.share || (a.step ? a.step[0] - b.step[0] : 0) || a.row.rank - b.row.rank);
}

function renderTimes(update) {
  if (!setVisible("times", state.target !== null && data.curves.includes(data.by))) return;
  const isPercent = isFraction(data.by), factor = isPercent ? 100 : 1, entries = timesToTarget();
  const input = html("input", { type: "number", id: "target", step: "any", value: Number((factor * state.target).toPrecision(6)),
    onchange: () => { if (input.value !== "") { state.target = Number(input.value) / factor; update(); } } });
  const reached = entries.filter((entry) => entry.count);
  const longest = (name) => Math.max(...reached.map((entry) => (entry[name] ? entry[name][0] : 0))) || 1;
  const ends = { step: longest("step"), seconds: longest("seconds") };
  const cell = ({ share, ...entry }, name, colour) => html("td", { class: "number" }, !entry[name] ? "–" : html("span", { class: "swatch" },
    formatStatistic(name === "step" ? "steps" : name, entry[name]), bar(entry[name][0] / ends[name], colour, share < 1)));
  const rows = entries.slice(0, state.all ? entries.length : 20).map((entry) => html("tr", {},
    html("td", { class: "number" }, String(entry.row.rank)), html("td", { class: "wrap" }, entry.row.label), html("td", { class: "number" }, `${entry.count} of ${entry.runs}`),
    cell(entry, "step", 0), cell(entry, "seconds", 1)));
  const heads = [["#", "number"], ["configuration"], ["runs", "number"], ["updates", "number"], ["seconds", "number"]];
  sectionBody("times").replaceChildren(
    html("div", { class: "controls" }, html("label", {}, `${metricTitle(data.by)} ${data.lower ? "at most" : "at least"} `, input, isPercent ? " %" : "")),
    html("p", { class: "note" }, `${reached.length} of ${entries.length} configurations reach the target. Ranked by the share of ended runs that reach it, then by updates. Mean ± standard deviation over these runs, at the first evaluated epoch; pale: not all runs reach it.`),
    scrollable(tableOf(heads, rows), "Time to target"), allButton(entries.length, 20, update));
}
