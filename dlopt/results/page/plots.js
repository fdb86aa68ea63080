// Parallel coordinates, time to target.

// Returns a bar of a fraction of 100 pixels.
function bar(fraction, colour, isPale = false) {
  return svg("svg", { width: 104, height: 12, "aria-hidden": "true" },
    svg("rect", { y: 1, width: Math.max(1, 102 * fraction), height: 10, fill: `var(--c${colour})`, opacity: isPale ? 0.4 : null }));
}

// -- parallel coordinates

const brushes = {}; // axis -> [low, high] in 0..1

function shadeOf(fraction) { // faint to strong: better is stronger, also in print
  return `color-mix(in srgb, var(--strong) ${Math.round(100 * fraction ** 2)}%, var(--faint))`;
}

function renderParallel() {
  if (!setVisible("parallel", Boolean(data.parallel))) return;
  const { axes, lines: positions } = data.parallel, title = data.titles[data.by];
  const rows = visible.filter((row) => row.ranked), container = html("div", { class: "chart", id: "parallel-chart" });
  sectionBody("parallel").replaceChildren(container, html("p", { class: "note" }, `One line per configuration; stronger is better (${title}). Drag along an axis to highlight the lines that cross the range; click the axis to reset.`));
  const available = Math.max(280, container.clientWidth), width = Math.max(available, 118 * axes.length), height = 330, top = 34, bottom = height - 14;
  const x = (i) => 14 + (i * (width - 100)) / (axes.length - 1), y = (fraction) => bottom - fraction * (bottom - top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, width, role: "img", "aria-label": "parallel coordinates" });
  const lines = rows.map((row, i) => {
    const points = positions[row.rank - 1].map((position, k) => (position === null ? null : `${x(k).toFixed(1)} ${y(position).toFixed(1)}`)).filter(Boolean);
    return { row, positions: positions[row.rank - 1], colour: shadeOf(1 - i / Math.max(rows.length - 1, 1)), path: svg("path", { d: `M${points.join("L")}`, fill: "none" }) };
  });
  const paint = () => {
    for (const line of lines) {
      const kept = axes.every(({ id }, k) => !brushes[id] || (line.positions[k] !== null && line.positions[k] >= brushes[id][0] && line.positions[k] <= brushes[id][1]));
      fill(line.path, { stroke: kept ? line.colour : "var(--grid)", "stroke-width": kept && line.row === selectedRow() ? 3 : 1.3, class: kept ? "kept" : "" }, []);
    }
  };
  for (const line of [...lines].reverse()) {
    line.path.addEventListener("pointermove", (event) => {
      line.path.setAttribute("stroke-width", 3.5);
      showTooltip(event.clientX, event.clientY, `#${line.row.rank} ${line.row.label}`, [["", title, line.row.cells[data.by][1]]]);
    });
    line.path.addEventListener("pointerleave", () => { paint(); hideTooltip(); });
    line.path.addEventListener("click", () => { state.selected = line.row.id; render(); });
    root.append(line.path);
  }
  axes.forEach((axis, k) => root.append(parallelAxis(axis, x(k), y, paint, k === 0 ? "start" : "middle")));
  paint();
  container.replaceChildren(html("div", width > available ? { class: "scroll" } : {}, root));
  if (width > available) root.style.width = `${width}px`;
}

function parallelAxis(axis, x, y, paint, anchor) {
  const mark = svg("rect", { x: x - 5, width: 10, fill: "var(--c1)", opacity: 0.3, visibility: "hidden" });
  const showBrush = () => {
    const range = brushes[axis.id];
    fill(mark, range ? { y: y(range[1]), height: y(range[0]) - y(range[1]), visibility: "visible" } : { visibility: "hidden" }, []);
  };
  const handle = svg("rect", { x: x - 12, width: 24, y: y(1) - 6, height: y(0) - y(1) + 12, fill: "var(--paper)", opacity: 0, "data-axis": axis.id });
  const fractionAt = (event) => {
    const box = handle.getBoundingClientRect();
    return 1 - (event.clientY - box.top - 6) / (box.height - 12);
  };
  let start = null;
  handle.addEventListener("pointerdown", (event) => { start = fractionAt(event); handle.setPointerCapture(event.pointerId); });
  handle.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const end = fractionAt(event);
    brushes[axis.id] = [Math.min(start, end), Math.max(start, end)];
    showBrush();
    paint();
  });
  handle.addEventListener("pointerup", (event) => {
    if (start !== null && Math.abs(fractionAt(event) - start) < 0.01) delete brushes[axis.id];
    start = null;
    showBrush();
    paint();
  });
  showBrush();
  handle.style.cursor = "row-resize";
  const labels = axis.ticks.map(([position, text]) => svg("text", { x: x + 7, y: y(position) + 4, stroke: "var(--paper)", "stroke-width": 3, "paint-order": "stroke", "pointer-events": "none" }, text));
  const short = axis.name.length > 20 ? `${axis.name.slice(0, 19)}…` : axis.name;
  return svg("g", {}, svg("line", { class: "axis", x1: x, x2: x, y1: y(1), y2: y(0) }), mark, ...labels, handle,
    svg("text", { x: anchor === "start" ? x - 12 : x, y: 14, "text-anchor": anchor, "font-weight": 600 }, svg("title", {}, axis.full), short));
}

// -- time to target

function renderTimes(update) {
  if (!setVisible("times", data.times.length > 0)) return;
  const { target, entries } = data.times.find((each) => each.target === state.target) || data.times[0];
  state.target = target;
  const shown = entries.map(([row, ...entry]) => [data.rows[row], ...entry]).filter(([row]) => visible.includes(row));
  const cell = (value, colour, isPale) => html("td", { class: "number" }, !value ? "–" : html("span", { class: "swatch" }, value[0], bar(value[1], colour, isPale)));
  const rows = shown.slice(0, state.all ? shown.length : 20).map(([row, count, share, isPale, step, seconds]) => html("tr", {},
    html("td", { class: "number" }, String(row.rank)), html("td", { class: "wrap" }, row.label), html("td", { class: "number" }, share),
    cell(step, 0, isPale), cell(seconds, 1, isPale)));
  const heads = [["#", "number"], ["configuration"], ["runs", "number"], ["updates", "number"], ["seconds", "number"]];
  sectionBody("times").replaceChildren(
    html("div", { class: "controls" }, selectControl("target", `${data.titles[data.by]} ${data.lower ? "at most" : "at least"}`, Object.fromEntries(data.times.map((each) => [each.target, each.target])), update)),
    html("p", { class: "note" }, `Target reached by ${shown.filter(([, count]) => count).length} of ${shown.length} configurations. Ranked by the share of ended runs that reach it, then by updates. Mean ± standard deviation over these runs, at the first evaluated epoch; pale: not all runs reach it.`),
    scrollable(tableOf(heads, rows), "Time to target"), allButton(shown.length, 20, update));
}
