// Differences to #1: the picture below the headline, and the bars in the table. Means and intervals are those of the table.

const DOTS = 12; // configurations without "Show all"

// Returns #1 and the configurations that are compared with it, in the order of the table.
function comparedRows() {
  return sorted().filter((row) => row.difference || row === data.rows[0]);
}

// Returns the ends of the axis: all means and 0, with intervals up to twice the median one. Longer ones end in an arrow, as do means
// far from the others, such as losses of diverged runs.
function differenceRange(rows) {
  const found = rows.map((row) => row.difference).filter(Boolean), middle = (values) => values.sort((a, b) => a - b)[values.length >> 1] ?? 0;
  const widest = 2 * middle(found.filter(([, low]) => low !== null).map(([value, low]) => value - low));
  const farthest = isPercent(data.by) ? Infinity : 20 * middle(found.map(([value]) => Math.abs(value)).filter(Boolean)) || Infinity;
  const [low, high] = extent([0, ...found.flatMap(([value, from, to]) => {
    const near = Math.min(Math.max(value, -farthest), farthest);
    return [near - Math.min(value - (from ?? value), widest), near + Math.min((to ?? value) - value, widest)];
  })]);
  const margin = 0.04 * (high - low) || 0.01;
  return [low - margin, high + margin];
}

// Returns the marks of a difference: its interval, with arrows where it leaves the axis, and its mean, hollow if 0 is in the interval or
// there is none.
function differenceMarks([value, low, high], x, y, from, to, colour, radius) {
  const at = (number) => Math.min(Math.max(x(number), from), to), isClear = low !== null && (low > 0 || high < 0), stroke = `var(${colour})`;
  const arrow = (end, side) => svg("path", { d: `M${end} ${y}l${-6 * side} -3.5v7z`, fill: stroke, class: "arrow" });
  const [start, end] = [low ?? value, high ?? value], isOutside = at(value) !== x(value);
  return [start < end ? svg("line", { x1: at(start), x2: at(end), y1: y, y2: y, stroke, "stroke-width": 2, class: "interval" }) : null,
    at(start) > x(start) ? arrow(from, -1) : null, at(end) < x(end) ? arrow(to, 1) : null,
    isOutside ? null : svg("circle", { cx: x(value), cy: y, r: radius, stroke, "stroke-width": 2, fill: isClear ? stroke : "var(--paper)", class: "dot" })].filter(Boolean);
}

function renderVersus(update) {
  const rows = comparedRows();
  if (!setVisible("versus", rows.length > 0 && data.rows.some((row) => row.difference))) return;
  const shown = state.all ? rows : rows.slice(0, DOTS), container = html("div", { class: "chart", id: "versus-chart" });
  const column = data.columns.find(({ id }) => id === "difference").name, name = `${data.titles[data.by]} ${column}`;
  sectionBody("versus").replaceChildren(container, html("p", { class: "note" }, versusNote(shown)), allButton(rows.length, DOTS, update));
  const root = svg("svg", { role: "img", class: "versus", "aria-label": `${name} of ${shown.length} configurations; the leaderboard has the numbers` });
  drawVersus(root, shown, column, widthOf(container));
  container.replaceChildren(root, exportButtons(name, root, () => [["configuration", column, "low", "high"],
    ...shown.map((row) => [`#${row.cells.rank[1]} ${row.label}`, ...(row.difference || [0, 0, 0])])]));
}

function versusNote(rows) {
  const hasIntervals = rows.some(({ difference }) => difference && difference[1] !== null);
  return hasIntervals ? "Bars: 95 % intervals, simultaneous for the whole table. Hollow: 0 is inside, not distinguishable from #1." : "No intervals: they need three common seeds.";
}

function drawVersus(root, rows, column, width) {
  const isNarrow = width < 560, size = isNarrow ? 40 : 26, names = rows.map((row) => `#${row.cells.rank[1]} ${row.label}`);
  const texts = rows.map((row) => (row.difference ? row.cells.difference[1] : row.cells[data.by][1])), longest = (values) => Math.max(...values.map(textWidth));
  const most = Math.floor((isNarrow ? width - longest(texts) : 0.4 * width) / 7), short = names.map((text) => (text.length > most ? `${text.slice(0, most - 1)}…` : text));
  const from = isNarrow ? 8 : 18 + longest(short), to = isNarrow ? width - 8 : width - 18 - longest(texts);
  const top = 20, bottom = top + size * rows.length + 4, [low, high] = differenceRange(rows), x = scaleOf(low, high, from, to);
  const scale = isPercent(data.by) ? 100 : 1, worse = data.lower ? 1 : -1, ticks = linearTicks(scale * low, scale * high, (to - from) / 60);
  root.append(...ticks.flatMap((tick) => [gridLine(x(tick / scale), top, x(tick / scale), bottom), label(x(tick / scale), bottom + 15, formatNumber(tick))]),
    svg("line", { class: "axis zero", x1: x(0), x2: x(0), y1: top - 4, y2: bottom }), label(worse < 0 ? from : to, 11, worse < 0 ? "← worse" : "worse →", worse < 0 ? "start" : "end"),
    label(x(0), 11, "#1"), label((from + to) / 2, bottom + 33, column), ...rows.map((row, i) => versusRow(row, short[i], texts[i], { x, from, to, width, size, isNarrow, y: top + size * i })));
  fill(root, { viewBox: `0 0 ${width} ${bottom + 40}`, width, height: bottom + 40 }, []);
}

function versusRow(row, name, text, { x, from, to, width, size, isNarrow, y }) {
  const middle = y + size * (isNarrow ? 0.72 : 0.5), line = isNarrow ? y + 15 : middle + 4;
  return svg("g", { class: "cell", "data-row": row.id, onclick: () => { location.hash = addressOf(row.id); }, onpointerleave: hideTooltip,
    onpointermove: (event) => showTooltip(event.clientX, event.clientY, `#${row.cells.rank[1]} ${row.label}`, [["", data.titles[data.by], row.cells[data.by][1]], ["", "vs. best", row.cells.difference[1] || "–"]]) },
  svg("rect", { x: 0, y, width, height: size, fill: "transparent" }), label(isNarrow ? from - 4 : from - 10, line, name, isNarrow ? "start" : "end"),
  svg("text", { x: width - 4, y: line, "text-anchor": "end", class: "value" }, text),
  ...differenceMarks(row.difference || [0, null, null], x, middle, from, to, row.difference ? styleOfRow(row)?.colour ?? "--soft" : "--ink", 4.5));
}

// Returns the bar of a cell, on the axis of the picture.
function differenceBar(row, [low, high]) {
  const width = 96, x = scaleOf(low, high, 6, width - 6);
  return svg("svg", { class: "bar", width, height: 14, "aria-hidden": "true" }, svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: 14 }),
    ...(row.difference ? differenceMarks(row.difference, x, 7, 6, width - 6, styleOfRow(row)?.colour ?? "--soft", 3.5) : []));
}
