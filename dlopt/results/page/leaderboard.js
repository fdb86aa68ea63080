// Leaderboard.

const PAPER = 960; // pixels of the screen that fit a printed page
let unfitting = []; // columns that are hidden until the table fits the page; the reader may choose others

function columns() {
  const hidden = state.columns || unfitting, list = data.columns.filter((column) => !hidden.includes(column.id));
  const place = ({ id, full }) => id === "rank" ? 0 : full ? 1 : id === data.by ? 2 : 3; // full: of a config key
  return innerWidth < 640 ? list.sort((a, b) => place(a) - place(b)) : list; // visible without scrolling
}

function sorted() {
  const [id, direction] = state.sort;
  return [...visible].sort((a, b) => {
    const [x, y] = [a, b].map((row) => (row.cells[id] || row.cells.rank)[0]);
    if (x === null || y === null) return (x === null) - (y === null) || a.rank - b.rank;
    return (x < y ? -1 : x > y ? 1 : 0) * direction || a.rank - b.rank;
  });
}

function sortBy(column, update) {
  state.sort = [column.id, state.sort[0] === column.id ? -state.sort[1] : column.higher ? -1 : 1];
  update();
}

function renderLeaderboard(update) {
  setVisible("leaderboard", true);
  unfitting = [];
  drawLeaderboard(update);
  if (state.columns || innerWidth < 640) return; // a phone shows the most important columns first, and scrolls
  for (const id of data.expendable) {
    const scroll = document.querySelector("#leaderboard .scroll");
    if (scroll.scrollWidth <= (isPrinting ? PAPER : scroll.parentElement.parentElement.clientWidth)) return;
    unfitting.push(id);
    drawLeaderboard(update);
  }
}

function drawLeaderboard(update) {
  const list = columns(), rows = sorted(), plotted = plottedRows(), range = differenceRange(comparedRows().slice(0, DOTS));
  const head = list.map((column) => {
    const [id, direction] = state.sort, active = id === column.id;
    return html("th", { class: (column.number ? "number" : "") + (column.full ? " key" : ""), scope: "col", title: column.full, "data-column": column.id,
      "aria-sort": active ? (direction > 0 ? "ascending" : "descending") : "none" },
      html("button", { type: "button", onclick: () => sortBy(column, update) }, column.name, active ? (direction > 0 ? "\u00a0▲" : "\u00a0▼") : ""));
  });
  const visibleRows = state.all ? rows : rows.slice(0, PAGE);
  const table = html("table", { class: "wide" }, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "plot"), ...head)),
    html("tbody", {}, ...visibleRows.map((row) => tableRow(row, list, plotted, range, update))));
  sectionBody("leaderboard").replaceChildren(
    html("p", { class: "note" }, data.ranked, html("span", { class: "screen" }, " Click a heading to sort, or a row to see its runs.")),
    scrollable(table, "Leaderboard"), ...data.remarks.map((remark) => html("p", { class: "note remark" }, remark)),
    columnChoice(update), allButton(rows.length, PAGE, update));
}

// Returns the button that shows all rows of the tables, or only the first ones.
function allButton(total, first, update) {
  return total > first ? html("div", { class: "controls" }, html("button", { type: "button", onclick: () => { state.all = !state.all; update(); } },
    state.all ? `Show the first ${first}` : `Show all ${total}`)) : "";
}

function columnChoice(update) {
  const hidden = state.columns || unfitting, names = data.columns.filter((column) => hidden.includes(column.id)).map((column) => column.name);
  const boxes = data.columns.filter((column) => column.id !== "rank").map((column) => html("label", {}, html("input", { type: "checkbox", "data-show": column.id,
    checked: !hidden.includes(column.id), onchange: (event) => {
      const others = hidden.filter((id) => id !== column.id);
      state.columns = event.target.checked ? others : [...others, column.id];
      update();
    } }), ` ${column.full || column.name}`));
  return html("details", { class: "columns", open: state.choosing, ontoggle: (event) => { state.choosing = event.target.open; saveState(); } },
    html("summary", {}, "Columns ", html("span", { class: "soft" }, names.length ? `hidden: ${names.join(", ")}` : "")), html("div", { class: "choices" }, ...boxes));
}

function tableRow(row, list, plotted, range, update) {
  const entry = plotted.find((other) => other.row === row), bad = row.runs.find(urgentOf);
  const box = html("input", { type: "checkbox", checked: Boolean(entry), "aria-label": `plot ${row.label}`, onclick: (event) => event.stopPropagation(),
    onchange: () => { togglePlotted(row); update(); } });
  const contentOf = ({ id }) => {
    const text = row.cells[id][1];
    if (id === "rank") return [html("a", { href: addressOf(row.id), title: `Show ${row.label}` }, text), ...(row.mark ? [html("sup", { title: row.remarks.join("\n") }, row.mark)] : [])];
    if (id === "difference") return [html("span", {}, text), differenceBar(row, range)];
    if (id === data.by) return [html("b", {}, text)];
    if (id !== "runs") return [text];
    return [text, row.note ? html("small", { class: row.bad ? "bad" : "soft" }, ` ${row.note}`) : null,
      bad ? html("a", { class: "bad", href: addressOf(bad.id) }, html("small", {}, ` ${urgentOf(bad).title}`)) : null].filter(Boolean);
  };
  const cells = list.map((column) => html("td", { class: (column.number ? "number" : "") + (column.full ? " key" : "") }, ...contentOf(column)));
  return html("tr", { class: "row", "data-rank": row.rank, onclick: (event) => { if (!event.target.closest("a, td:first-child")) location.hash = addressOf(row.id); } },
    html("td", {}, html("span", { class: "swatch" }, box, entry ? swatch(entry.style) : null)), ...cells);
}
