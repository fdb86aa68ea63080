// Heat map, parallel coordinates, time to target.

// Returns a bar of a fraction of 70 pixels.
function bar(fraction, colour, isPale = false) {
  return svg("svg", { width: 74, height: 12, "aria-hidden": "true" },
    svg("rect", { y: 1, width: Math.max(1, 72 * fraction), height: 10, fill: `var(${colour})`, opacity: isPale ? 0.4 : null }));
}

// -- parallel coordinates

const brushes = {}; // axis -> [low, high] in 0..1

function renderParallel() {
  if (!setVisible("parallel", Boolean(data.parallel))) return;
  const { axes, lines: positions } = data.parallel, title = data.titles[data.by];
  const rows = visible.filter((row) => row.ranked), container = html("div", { class: "chart", id: "parallel-chart" });
  const root = svg("svg", { role: "img", "aria-label": "parallel coordinates" });
  const table = () => [[...axes.map((axis) => axis.full)], ...rows.map((row) => axes.map(({ id }) => (row.cells[`key ${id}`] || row.cells[id])[0]))];
  sectionBody("parallel").replaceChildren(container, exportButtons("parallel coordinates", root, table),
    html("p", { class: "note" }, `One line per configuration; stronger is better (${title}).`,
      html("span", { class: "screen" }, " Drag along an axis to highlight the lines that cross the range; click the axis to reset.")));
  const left = 16 + widest(axes[0]), right = 16 + widest(axes.at(-1)), available = widthOf(container);
  const width = Math.max(available, left + right + gapOf(axes) * (axes.length - 1)), height = 330, top = 34, bottom = height - 14;
  const x = (i) => left + (i * (width - left - right)) / (axes.length - 1), y = (fraction) => bottom - fraction * (bottom - top);
  const lines = rows.map((row, i) => {
    const points = positions[row.rank - 1].map((position, k) => (position === null ? null : [x(k), y(position)])).filter(Boolean);
    const path = svg("path", { d: pathOf(points), fill: "none", "stroke-opacity": 0.15 + 0.85 * (1 - i / Math.max(rows.length - 1, 1)) ** 2 });
    return { row, positions: positions[row.rank - 1], colour: state.colour ? `var(${styleOfRow(row).colour})` : "var(--strong)", path };
  });
  const isKept = (line) => axes.every(({ id }, k) => !brushes[id] || (line.positions[k] !== null && line.positions[k] >= brushes[id][0] && line.positions[k] <= brushes[id][1]));
  const paint = () => {
    for (const line of lines) fill(line.path, isKept(line) ? { stroke: line.colour, "stroke-width": 1.6, class: "kept" } : { stroke: "var(--grid)", "stroke-width": 1.3, class: "" }, []);
  };
  for (const line of [...lines].reverse()) {
    line.path.addEventListener("pointermove", (event) => {
      line.path.setAttribute("stroke-width", 3.5);
      showTooltip(event.clientX, event.clientY, `#${line.row.cells.rank[1]} ${line.row.label}`, [["", title, line.row.cells[data.by][1]]]);
    });
    line.path.addEventListener("pointerleave", () => { paint(); hideTooltip(); });
    line.path.addEventListener("click", () => { location.hash = addressOf(line.row.id); });
    root.append(line.path);
  }
  axes.forEach((axis, k) => root.append(parallelAxis(axis, x(k), y, paint, k === 0 ? "start" : k === axes.length - 1 ? "end" : "middle")));
  paint();
  fill(root, { viewBox: `0 0 ${width} ${height}`, height, width }, []);
  container.replaceChildren(html("div", width > available ? { class: "scroll" } : {}, root));
  if (width > available) root.style.width = `${width}px`;
}

const LONGEST_LABEL = 20; // characters

function shortened(text) {
  return text.length > LONGEST_LABEL ? `${text.slice(0, LONGEST_LABEL - 1)}…` : text;
}

function widest(axis) {
  return 8 * Math.max(...axis.ticks.map(([, text]) => shortened(text).length), shortened(axis.name).length / 2);
}

// Returns the least distance of the axes, for their names and for the labels beside the inner ones.
function gapOf(axes) {
  const names = axes.slice(1).map((axis, k) => 4 * (shortened(axes[k].name).length + shortened(axis.name).length) + 8);
  const labels = axes.slice(1, -1).map((axis) => 7 * Math.max(...axis.ticks.map(([, text]) => shortened(text).length)) + 28);
  return Math.min(130, Math.max(64, ...names, ...labels));
}

// Returns the labels of an axis: outside of the first and the last one, where no line passes; else on a background.
function axisLabels(axis, x, y, place) {
  const isLeft = place !== "end";
  return axis.ticks.flatMap(([position, text]) => {
    const short = shortened(text), width = 7 * short.length + 4;
    const back = place === "middle" ? [svg("rect", { x: x - 8 - width, y: y(position) - 8, width, height: 16, fill: "var(--paper)", "pointer-events": "none" })] : [];
    return [...back, svg("text", { x: x + (isLeft ? -9 : 9), y: y(position) + 4, "text-anchor": isLeft ? "end" : "start", "pointer-events": "none" }, svg("title", {}, text), short)];
  });
}

function parallelAxis(axis, x, y, paint, place) {
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
  return svg("g", {}, svg("line", { class: "axis", x1: x, x2: x, y1: y(1), y2: y(0) }), mark, ...axisLabels(axis, x, y, place), handle,
    svg("text", { x, y: 14, "text-anchor": "middle", "font-weight": 600 }, svg("title", {}, axis.full), shortened(axis.name)));
}

// -- heat map

const MOST_CELLS = 24; // values of a key on an axis

// Returns the keys with few values, those with more of them first.
function heatKeys() {
  const count = (key) => valuesOf(key).length;
  return sharedKeys().filter((key) => count(key) > 1 && count(key) <= MOST_CELLS).sort((a, b) => count(b) - count(a));
}

function renderHeatMap(update) {
  const keys = heatKeys();
  if (!setVisible("heat", keys.length > 1 && data.rows.some((row) => row.ranked))) return;
  if (!keys.includes(state.heatX)) state.heatX = keys.find((key) => key !== state.heatY);
  if (!keys.includes(state.heatY) || state.heatX === state.heatY) state.heatY = keys.find((key) => key !== state.heatX);
  const cells = heatCells(), names = Object.fromEntries(keys.map((key) => [key, key])), container = html("div", { class: "chart", id: "heat-chart" });
  sectionBody("heat").replaceChildren(html("div", { class: "controls" }, selectControl("heatX", "columns", names, update), selectControl("heatY", "rows", names, update),
    selectControl("heatCell", "cells", { best: `best ${data.titles[data.by]}`, mean: `mean ${data.titles[data.by]}` }, update)), container,
    html("p", { class: "note" }, `${state.heatCell === "best" ? "Best" : "Mean"} over the other keys, of the configurations that match the filters; stronger is better.`));
  const root = heatMap(cells, widthOf(container));
  const table = () => [[state.heatX, state.heatY, `${state.heatCell} ${data.by}`, "configurations"], ...cells.map((cell) => [cell.x, cell.y, cell.value, cell.rows.length])];
  container.replaceChildren(html("div", { class: "overflow" }, root), exportButtons(`${data.titles[data.by]} by ${state.heatX} and ${state.heatY}`, root, table));
}

function heatCells() {
  const found = new Map();
  for (const row of visible.filter((each) => each.ranked)) {
    const x = formatValue(row.values[state.heatX]), y = formatValue(row.values[state.heatY]), id = JSON.stringify([x, y]);
    if (!found.has(id)) found.set(id, { x, y, rows: [] });
    found.get(id).rows.push(row);
  }
  const best = (values) => (data.lower ? Math.min(...values) : Math.max(...values));
  return [...found.values()].map((cell) => ({ ...cell, value: (state.heatCell === "best" ? best : mean)(known(cell.rows, data.by)) }));
}

function heatMap(cells, available) {
  const [xs, ys] = [state.heatX, state.heatY].map((key) => valuesOf(key).map(formatValue)), [low, high] = extent(cells.map((cell) => cell.value));
  const isLog = low > 0 && high > 20 * low, shade = scaleOf(low, high, 0, 1, isLog); // losses of diverged runs would make all others equal
  const [nameX, nameY] = [state.heatX, state.heatY].map((key) => data.columns.find((column) => column.id === `key ${key}`).name);
  const left = 16 + 9 * Math.min(LONGEST_LABEL, Math.max(nameY.length, ...ys.map((text) => text.length)));
  const least = Math.max(56, 8 * Math.max(...xs.map((text) => text.length)) + 6); // for the labels below
  const size = Math.min(Math.max((available - left - 8) / xs.length, least), 120), width = left + size * xs.length + 8, height = 52 + 30 * ys.length;
  const middle = (i) => left + size * (i + 0.5), line = (i) => 26 + 30 * (ys.length - 1 - i);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${data.titles[data.by]} by ${state.heatX} and ${state.heatY}` });
  root.append(svg("text", { x: left - 8, y: 15, "text-anchor": "end", "font-weight": 600 }, shortened(nameY)),
    ...ys.map((text, i) => label(left - 8, line(i) + 19, shortened(text), "end")), ...xs.map((text, i) => label(middle(i), height - 8, shortened(text).slice(0, Math.floor(size / 7)))),
    svg("text", { x: left + (size * xs.length) / 2, y: 15, "text-anchor": "middle", "font-weight": 600 }, nameX),
    ...cells.map((cell) => heatCell(cell, middle(xs.indexOf(cell.x)) - size / 2, line(ys.indexOf(cell.y)), size, high > low ? shade(cell.value) : 1)));
  return root;
}

function heatCell(cell, x, y, size, fraction) {
  const goodness = data.lower ? 1 - fraction : fraction, best = cell.rows[0];
  return svg("g", { class: "cell", onclick: () => { location.hash = addressOf(best.id); }, onpointerleave: hideTooltip,
    onpointermove: (event) => showTooltip(event.clientX, event.clientY, `${state.heatX}=${cell.x} ${state.heatY}=${cell.y}`,
      [["", data.titles[data.by], formatMetric(data.by, cell.value)], ["", "configurations", String(cell.rows.length)], ["", `best: #${best.cells.rank[1]}`, best.cells[data.by][1]]]) },
    svg("rect", { x: x + 1, y: y + 1, width: size - 2, height: 28, fill: "var(--strong)", "fill-opacity": 0.06 + 0.9 * goodness }),
    svg("text", { x: x + size / 2, y: y + 19, "text-anchor": "middle", fill: goodness > 0.55 ? "var(--paper)" : "var(--ink)" }, isPercent(data.by) ? formatMetric(data.by, cell.value) : formatTick(data.by, Number(cell.value.toPrecision(4)))));
}

// -- time to target

function renderTimes(update) {
  if (!setVisible("times", data.times.length > 0)) return;
  const { target, entries } = data.times.find((each) => each.target === state.target) || data.times[0];
  state.target = target;
  const shown = entries.map(([row, ...entry]) => [data.rows[row], ...entry]).filter(([row]) => visible.includes(row));
  const cell = (value, colour, isPale) => html("td", { class: "number" }, !value ? "–" : html("span", { class: "swatch" }, value[0], bar(value[1], colour, isPale)));
  const rows = shown.slice(0, state.all ? shown.length : 20).map(([row, count, share, isPale, step, seconds]) => html("tr", {},
    html("td", { class: "number" }, row.cells.rank[1]), html("td", { class: "wrap" }, row.label), html("td", { class: "number" }, share),
    ...[step, seconds].map((value) => cell(value, styleOfRow(row)?.colour ?? "--soft", isPale))));
  const heads = [["#", "number"], ["configuration"], ["runs", "number"], ["updates", "number"], ["seconds", "number"]];
  sectionBody("times").replaceChildren(
    html("div", { class: "controls" }, selectControl("target", `${data.titles[data.by]} ${data.lower ? "at most" : "at least"}`, Object.fromEntries(data.times.map((each) => [each.target, each.target])), update)),
    html("p", { class: "note" }, `Target reached by ${shown.filter(([, count]) => count).length} of ${shown.length} configurations. Ranked by the share of ended runs that reach it, then by updates. Mean ± standard deviation over these runs, at the first evaluated epoch; pale: not all runs reach it.`),
    scrollable(tableOf(heads, rows), "Time to target"), allButton(shown.length, 20, update));
}
