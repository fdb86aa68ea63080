// Filters, leaderboard, selected configuration.

const SHOWN = 6; // configurations shown by default
const PAGE = 50; // rows of a table without "Show all"

function matchesFilters(row) {
  return data.keys.every((key) => {
    const value = row.values[key];
    if ((state.off[key] || []).includes(formatValue(value))) return false;
    const range = state.range[key];
    if (!range) return true;
    return (range[0] === null || value >= range[0]) && (range[1] === null || value <= range[1]);
  });
}

let visible = []; // rows that match the filters

// Returns the plotted configurations with their slots, which select the line styles: a configuration keeps its colour when
// others are added or removed.
function plottedRows() {
  const ranked = visible.filter((row) => row.ranked);
  const slots = state.shown === null ? (ranked.length ? ranked : visible).slice(0, SHOWN).map((row) => row.id) : state.shown;
  const rows = new Map(visible.map((row) => [row.id, row]));
  return slots.map((id, slot) => ({ row: rows.get(id), slot })).filter(({ row }) => row);
}

function togglePlotted(row) {
  const plotted = plottedRows(), slots = [];
  for (const entry of plotted) slots[entry.slot] = entry.row.id;
  const slot = slots.indexOf(row.id), free = [...slots, undefined].findIndex((id) => id === undefined);
  slots[slot >= 0 ? slot : free] = slot >= 0 ? null : row.id;
  state.shown = Array.from(slots, (id) => id ?? null);
}

function renderFilters(update) {
  const section = document.getElementById("filters");
  const groups = data.keys.map((key) => {
    const choices = [...new Map(data.rows.map((row) => [formatValue(row.values[key]), row.values[key]]))];
    const numbers = choices.every(([, value]) => typeof value === "number" || value === undefined);
    choices.sort(([a, x], [b, y]) => (numbers ? (x ?? Infinity) - (y ?? Infinity) : a < b ? -1 : 1));
    if (numbers && choices.length > 12) return rangeFilter(key, update);
    const boxes = choices.map(([text]) => {
      const box = html("input", { type: "checkbox", checked: !(state.off[key] || []).includes(text), "data-key": key, "data-value": text,
        onchange: () => {
          const off = new Set(state.off[key] || []);
          if (box.checked) off.delete(text); else off.add(text);
          state.off[key] = [...off];
          update();
        } });
      return html("label", {}, box, ` ${text}`);
    });
    return html("fieldset", {}, html("legend", {}, key), html("div", { class: "choices" }, ...boxes));
  });
  section.hidden = !groups.length;
  const open = state.open ?? innerWidth > 640;
  const details = html("details", { open, ontoggle: () => { state.open = details.open; saveState(); } },
    html("summary", {}, "Filters ", html("span", { class: "soft", id: "filtered" })),
    html("div", { class: "groups" }, ...groups),
    html("div", { class: "controls" }, html("button", { type: "button", id: "clear", onclick: () => {
      state.off = {};
      state.range = {};
      renderFilters(update);
      update();
    } }, "Clear filters")));
  section.replaceChildren(details);
}

function rangeFilter(key, update) {
  const bound = (i, text) => html("label", {}, `${text} `, html("input", { type: "number", step: "any", "data-key": key,
    value: state.range[key] ? state.range[key][i] : null, "aria-label": `${key} ${text}`,
    onchange: (event) => {
      const range = state.range[key] || [null, null];
      range[i] = event.target.value === "" ? null : Number(event.target.value);
      state.range[key] = range;
      update();
    } }));
  return html("fieldset", {}, html("legend", {}, key), html("div", { class: "controls" }, bound(0, "from"), bound(1, "to")));
}

// -- leaderboard

const PAPER = 960; // pixels of the screen that fit a printed page
let unfitting = []; // columns that are hidden until the table fits the page; the reader may choose others

function columns() {
  const hidden = state.columns || unfitting, list = data.columns.filter((column) => !hidden.includes(column.id));
  const by = list.findIndex((column) => column.id === data.by);
  if (innerWidth < 640 && by >= 0) list.splice(1, 0, ...list.splice(by, 1)); // visible without scrolling
  return list;
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
  const list = columns(), rows = sorted(), plotted = plottedRows();
  const head = list.map((column) => {
    const [id, direction] = state.sort, active = id === column.id;
    return html("th", { class: (column.number ? "number" : "") + (column.full ? " key" : ""), scope: "col", title: column.full, "data-column": column.id,
      "aria-sort": active ? (direction > 0 ? "ascending" : "descending") : "none" },
      html("button", { type: "button", onclick: () => sortBy(column, update) }, column.name, active ? (direction > 0 ? "\u00a0▲" : "\u00a0▼") : ""));
  });
  const visibleRows = state.all ? rows : rows.slice(0, PAGE);
  const table = html("table", { class: "wide" }, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "plot"), ...head)),
    html("tbody", {}, ...visibleRows.map((row) => tableRow(row, list, plotted, update))));
  sectionBody("leaderboard").replaceChildren(
    html("p", { class: "note" }, `${data.ranked} Click a heading to sort, or a row to select it.`),
    scrollable(table, "Leaderboard"), columnChoice(update), allButton(rows.length, PAGE, update));
  const filtered = document.getElementById("filtered");
  if (filtered) filtered.textContent = `${visible.length} of ${data.rows.length} configurations`;
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

function tableRow(row, list, plotted, update) {
  const entry = plotted.find((other) => other.row === row);
  const box = html("input", { type: "checkbox", checked: Boolean(entry), "aria-label": `plot ${row.label}`, onclick: (event) => event.stopPropagation(),
    onchange: () => { togglePlotted(row); update(); } });
  const cells = list.map((column) => html("td", { class: (column.number ? "number" : "") + (column.full ? " key" : "") },
    column.id === data.by ? html("b", {}, row.cells[column.id][1]) : row.cells[column.id][1],
    column.id === "runs" && row.note ? html("small", { class: row.bad ? "bad" : "soft" }, ` ${row.note}`) : null));
  return html("tr", { class: "row", tabindex: 0, "aria-selected": String(row === selectedRow()), "data-rank": row.rank,
    onclick: () => { state.selected = row.id; update(); },
    onkeydown: (event) => { if (event.key === "Enter" && event.target.tagName === "TR") { state.selected = row.id; update(); } } },
    html("td", {}, html("span", { class: "swatch" }, box, entry ? swatch(styleOf(entry.slot)) : null)), ...cells);
}

// -- selected configuration

function selectedRow() {
  return data.rows.find((row) => row.id === state.selected) || data.rows[0];
}

function renderSelected() {
  const row = selectedRow();
  if (!setVisible("selected", Boolean(row))) return;
  const runs = row.runs.map((run) => html("tr", {},
    html("td", {}, run.path), html("td", { class: "number" }, run.seed), html("td", {}, run.status),
    ...run.metrics.map((text) => html("td", { class: "number" }, text)),
    html("td", {}, copyButton(run.command, "copy command")), html("td", {}, copyButton(run.from, "copy from="))));
  const heads = [["folder"], ["seed", "number"], ["status"], ...row.heads.map((name) => [name, "number"]), ["repeat run"], ["repeat from folder"]];
  sectionBody("selected").replaceChildren(
    html("p", {}, html("b", {}, `#${row.rank} `), row.label),
    html("ul", { class: "facts" }, ...row.facts.map(([name, text]) => html("li", {}, `${name} `, html("b", {}, text)))),
    html("p", { class: "note" }, row.about),
    row.command ? html("div", { class: "command" }, html("code", {}, row.command), copyButton(row.command, "Copy")) : html("p", { class: "note" }, "The command is unknown. You can repeat each run from its folder."),
    scrollable(tableOf(heads, runs), "Runs of the selected configuration"));
}

function copyButton(text, name) {
  if (!text) return "–";
  const button = html("button", { type: "button", title: text, onclick: async (event) => {
    event.stopPropagation();
    button.textContent = (await copyText(text)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = name; }, 1500);
  } }, name);
  return button;
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (error) {
    const area = html("textarea", {});
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
