// Filters, leaderboard, published results, selected configuration.

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
  const ranked = visible.filter((row) => row.metrics[data.by]);
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
  if (!groups.length) return void (section.hidden = true);
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

// Columns that are hidden, the first ones first, until the table fits the page; the reader may choose others.
const EXPENDABLE = ["train_loss", "train_accuracy", "gap", "accuracy_gap", "parameters", "epochs", "steps", "seconds"];
const PAPER = 960; // pixels of the screen that fit a printed page
let unfitting = [];

function columns(all = false) {
  const list = [{ id: "rank", name: "#", number: true, of: (row) => row.rank, text: (row) => String(row.rank) }];
  for (const key of data.keys) {
    const numbers = data.rows.every((row) => typeof (row.values[key] ?? 0) === "number");
    list.push({ id: `key ${key}`, name: data.short[key], full: key, number: numbers, key: true, of: (row) => row.values[key], text: (row) => formatValue(row.values[key]) });
  }
  list.push({ id: "runs", name: "runs", number: true, of: (row) => row.runs.length, text: (row) => String(row.runs.length), more: notEnded });
  for (const name of data.metrics) {
    list.push({ id: name, name: metricTitle(name), number: true, of: (row) => row.metrics[name] && row.metrics[name][0],
      text: (row) => formatStatistic(name, row.metrics[name]), strong: name === data.by });
    if (name === data.by && data.rows.some((row) => row.difference)) list.push(DIFFERENCE);
  }
  if (data.allTests) {
    for (const name of ["test_accuracy", "test_loss"].filter((test) => data.rows.some((row) => row.test && row.test[test]))) {
      list.push({ id: name, name: metricTitle(name), number: true, of: (row) => row.test && row.test[name] && row.test[name][0],
        text: (row) => formatStatistic(name, row.test && row.test[name]) });
    }
  }
  const hidden = state.columns || unfitting;
  if (!all) list.splice(0, list.length, ...list.filter((column) => !hidden.includes(column.id)));
  if (innerWidth < 640 && list.some((column) => column.strong)) list.splice(1, 0, ...list.splice(list.findIndex((column) => column.strong), 1)); // visible without scrolling
  return list;
}

const DIFFERENCE = { id: "difference", name: isFraction(data.by) ? "difference to #1 (points)" : "difference to #1", number: true, of: (row) => row.difference && row.difference[0],
  text: (row) => {
    if (!row.difference) return row.rank === 1 ? "" : "–";
    const [mean, low, high] = row.difference;
    return formatDifference(data.by, mean) + (low === null ? "" : ` [${formatDifference(data.by, low)}, ${formatDifference(data.by, high)}]`);
  } };

function notEnded(row) {
  const counts = {};
  for (const run of row.runs) if (!["finished", "stopped_early"].includes(run.status)) counts[run.status] = (counts[run.status] || 0) + 1;
  const text = Object.entries(counts).map(([status, count]) => `${count} ${status}`).join(", ");
  return text ? html("small", { class: row.failed ? "bad" : "soft" }, ` ${text}`) : null;
}

function sorted(list) {
  const [id, direction] = state.sort;
  const column = list.find((column) => column.id === id) || list[0];
  const missing = (value) => value === null || value === undefined;
  return [...visible].sort((a, b) => {
    const x = column.of(a), y = column.of(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a.rank - b.rank;
    return (x < y ? -1 : x > y ? 1 : 0) * direction || a.rank - b.rank;
  });
}

function sortBy(column, update) {
  const isHigherBetter = column.id === data.by ? !data.lower : isFraction(column.id) && !isLoss(column.id);
  state.sort = [column.id, state.sort[0] === column.id ? -state.sort[1] : isHigherBetter ? -1 : 1];
  update();
}

function renderLeaderboard(update) {
  unfitting = [];
  drawLeaderboard(update);
  if (state.columns || innerWidth < 640) return; // a phone shows the most important columns first, and scrolls
  for (const id of EXPENDABLE.filter((name) => data.metrics.includes(name) && name !== data.by)) {
    const scroll = document.querySelector("#leaderboard .scroll");
    if (scroll.scrollWidth <= (isPrinting ? PAPER : scroll.parentElement.parentElement.clientWidth)) return;
    unfitting.push(id);
    drawLeaderboard(update);
  }
}

function drawLeaderboard(update) {
  const list = columns(), rows = sorted(columns(true)), plotted = plottedRows();
  const head = list.map((column) => {
    const [id, direction] = state.sort, active = id === column.id;
    return html("th", { class: (column.number ? "number" : "") + (column.key ? " key" : ""), scope: "col", title: column.full, "data-column": column.id,
      "aria-sort": active ? (direction > 0 ? "ascending" : "descending") : "none" },
      html("button", { type: "button", onclick: () => sortBy(column, update) }, column.name, active ? (direction > 0 ? "\u00a0▲" : "\u00a0▼") : ""));
  });
  const visibleRows = state.all ? rows : rows.slice(0, PAGE);
  const table = html("table", { class: "wide" }, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "plot"), ...head)),
    html("tbody", {}, ...visibleRows.map((row) => tableRow(row, list, plotted, update))));
  sectionBody("leaderboard").replaceChildren(
    html("p", { class: "note" }, rankedBy()),
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
  const hidden = state.columns || unfitting, names = columns(true).filter((column) => hidden.includes(column.id)).map((column) => column.name);
  const boxes = columns(true).filter((column) => column.id !== "rank").map((column) => html("label", {}, html("input", { type: "checkbox", "data-show": column.id,
    checked: !hidden.includes(column.id), onchange: (event) => {
      const others = hidden.filter((id) => id !== column.id);
      state.columns = event.target.checked ? others : [...others, column.id];
      update();
    } }), ` ${column.full || column.name}`));
  return html("details", { class: "columns", open: state.choosing, ontoggle: (event) => { state.choosing = event.target.open; saveState(); } },
    html("summary", {}, "Columns ", html("span", { class: "soft" }, names.length ? `hidden: ${names.join(", ")}` : "")), html("div", { class: "choices" }, ...boxes));
}

function rankedBy() {
  const seeds = data.rows.some((row) => row.runs.length > 1);
  return `Ranked by ${metricTitle(data.by)} of the best epoch${seeds ? ": mean ± standard deviation over seeds" : ""}.` +
    (data.rows.some((row) => row.difference && row.difference[1] !== null) ? " Differences to #1 are paired over seeds, with 95 % confidence intervals." : "") +
    " Click a heading to sort, or a row to select it.";
}

function tableRow(row, list, plotted, update) {
  const entry = plotted.find((other) => other.row === row);
  const box = html("input", { type: "checkbox", checked: Boolean(entry), "aria-label": `plot ${row.label}`, onclick: (event) => event.stopPropagation(),
    onchange: () => { togglePlotted(row); update(); } });
  const cells = list.map((column) => html("td", { class: (column.number ? "number" : "") + (column.key ? " key" : "") },
    column.strong ? html("b", {}, column.text(row)) : column.text(row), column.more ? column.more(row) : null));
  return html("tr", { class: "row", tabindex: 0, "aria-selected": String(row === selectedRow()), "data-rank": row.rank,
    onclick: () => { state.selected = row.id; update(); },
    onkeydown: (event) => { if (event.key === "Enter" && event.target.tagName === "TR") { state.selected = row.id; update(); } } },
    html("td", {}, html("span", { class: "swatch" }, box, entry ? swatch(styleOf(entry.slot)) : null)), ...cells);
}

// -- published results

function renderPublished() {
  if (!setVisible("published", data.published.length > 0)) return;
  const number = (text) => html("td", { class: "number" }, text);
  const rows = data.published.map(([name, measured, error, runs]) => {
    const deviation = measured && measured[1] !== null ? ` ± ${measured[1].toFixed(2)}` : "";
    return html("tr", {}, html("td", {}, name), number(measured ? measured[0].toFixed(2) + deviation : "–"), number(error.toFixed(2)),
      number(measured ? (measured[0] - error).toFixed(2) : ""), number(runs));
  });
  const heads = [["recipe"], ...["test error %", "published", "difference", "runs"].map((name) => [name, "number"])];
  sectionBody("published").replaceChildren(scrollable(tableOf(heads, rows), "Published results"));
}

// -- selected configuration

function selectedRow() {
  return data.rows.find((row) => row.id === state.selected) || data.rows[0];
}

function renderSelected() {
  const row = selectedRow();
  if (!setVisible("selected", Boolean(row))) return;
  const facts = data.metrics.map((name) => [metricTitle(name), formatStatistic(name, row.metrics[name])]);
  for (const [name, values] of Object.entries(row.test || {})) facts.push([metricTitle(name), formatStatistic(name, values)]);
  const names = [...new Set([data.by, "val_loss", "best_epoch", "epochs", "seconds"])].filter((name) => row.runs.some((run) => name in run.metrics));
  const runs = row.runs.map((run) => html("tr", {},
    html("td", {}, run.path), html("td", { class: "number" }, formatValue(run.seed)), html("td", {}, run.status.replace("_", " ")),
    ...names.map((name) => html("td", { class: "number" }, formatMetric(name, run.metrics[name]))),
    html("td", {}, copyButton(run.command, "copy command")), html("td", {}, copyButton(run.from, "copy from="))));
  const heads = [["folder"], ["seed", "number"], ["status"], ...names.map((name) => [metricTitle(name), "number"]), ["repeat run"], ["repeat from folder"]];
  sectionBody("selected").replaceChildren(
    html("p", {}, html("b", {}, `#${row.rank} `), row.label),
    html("ul", { class: "facts" }, ...facts.map(([name, text]) => html("li", {}, `${name} `, html("b", {}, text)))),
    html("p", { class: "note" }, row.test ? (data.allTests ? "" : "Test metrics are shown for #1 only, which was selected on the validation set.")
      : row.rank === 1 ? "" : "Test metrics are shown for the first row only, to avoid selection on the test set. Show all with dlopt report test=true."),
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
