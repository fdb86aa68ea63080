// Filters, the table of configurations, the chosen one.

const SHOWN = 6; // configurations drawn until the reader chooses
const PAGE = 50; // rows of a table before "show all"

function passes(row) {
  return data.keys.every((key) => {
    const found = row.values[key];
    if ((state.off[key] || []).includes(value(found))) return false;
    const range = state.range[key];
    if (!range) return true;
    return (range[0] === null || found >= range[0]) && (range[1] === null || found <= range[1]);
  });
}

let visible = [];
function refilter() {
  visible = data.rows.filter(passes);
}

// The drawn configurations, in the order of their ranks, each with its place among the styles.
function drawn() {
  if (state.drawn !== null) return visible.filter((row) => state.drawn.includes(row.id));
  const ranked = visible.filter((row) => row.metrics[data.by]);
  return (ranked.length ? ranked : visible).slice(0, SHOWN);
}

function filters(update) {
  const section = document.getElementById("filters");
  const groups = data.keys.map((key) => {
    const found = [...new Map(data.rows.map((row) => [value(row.values[key]), row.values[key]]))];
    const numbers = found.every(([, each]) => typeof each === "number" || each === undefined);
    found.sort(([a, x], [b, y]) => (numbers ? (x ?? Infinity) - (y ?? Infinity) : a < b ? -1 : 1));
    if (numbers && found.length > 12) return rangeFilter(key, update);
    const boxes = found.map(([text]) => {
      const box = make("input", { type: "checkbox", checked: !(state.off[key] || []).includes(text), "data-key": key, "data-value": text,
        onchange: () => {
          const off = new Set(state.off[key] || []);
          if (box.checked) off.delete(text); else off.add(text);
          state.off[key] = [...off];
          update();
        } });
      return make("label", {}, box, ` ${text}`);
    });
    return make("fieldset", {}, make("legend", {}, key), make("div", { class: "choices" }, ...boxes));
  });
  if (!groups.length) return void (section.hidden = true);
  const open = state.open ?? innerWidth > 640;
  const details = make("details", { open, ontoggle: () => { state.open = details.open; keep(); } },
    make("summary", {}, "Filters ", make("span", { class: "soft", id: "filtered" })),
    make("div", { class: "groups" }, ...groups),
    make("div", { class: "controls" }, make("button", { type: "button", id: "clear", onclick: () => {
      state.off = {};
      state.range = {};
      filters(update);
      update();
    } }, "Clear filters")));
  section.replaceChildren(details);
}

function rangeFilter(key, update) {
  const bound = (i, text) => make("label", {}, `${text} `, make("input", { type: "number", step: "any", "data-key": key,
    value: state.range[key] ? state.range[key][i] : null, "aria-label": `${key} ${text}`,
    onchange: (event) => {
      const range = state.range[key] || [null, null];
      range[i] = event.target.value === "" ? null : Number(event.target.value);
      state.range[key] = range;
      update();
    } }));
  return make("fieldset", {}, make("legend", {}, key), make("div", { class: "controls" }, bound(0, "from"), bound(1, "to")));
}

// -- the table

function columns() {
  const list = [{ id: "rank", name: "#", number: true, of: (row) => row.rank, text: (row) => String(row.rank) }];
  for (const key of data.keys) {
    const numbers = data.rows.every((row) => typeof (row.values[key] ?? 0) === "number");
    list.push({ id: `key ${key}`, name: data.short[key], full: key, number: numbers, key: true, of: (row) => row.values[key], text: (row) => value(row.values[key]) });
  }
  list.push({ id: "runs", name: "runs", number: true, of: (row) => row.runs.length, text: (row) => String(row.runs.length), more: notEnded });
  for (const name of data.metrics) {
    list.push({ id: name, name: title(name), number: true, of: (row) => row.metrics[name] && row.metrics[name][0],
      text: (row) => statistic(name, row.metrics[name]), strong: name === data.by });
    if (name === data.by && data.rows.some((row) => row.difference)) list.push(DIFFERENCE);
  }
  if (data.allTests) {
    for (const name of ["test_accuracy", "test_loss"].filter((each) => data.rows.some((row) => row.test && row.test[each]))) {
      list.push({ id: name, name: title(name), number: true, of: (row) => row.test && row.test[name] && row.test[name][0],
        text: (row) => statistic(name, row.test && row.test[name]) });
    }
  }
  if (innerWidth < 640) list.splice(1, 0, ...list.splice(list.findIndex((each) => each.strong), 1)); // without scrolling
  return list;
}

const DIFFERENCE = { id: "difference", name: isShare(data.by) ? "to the first (points)" : "to the first", number: true, of: (row) => row.difference && row.difference[0],
  text: (row) => {
    if (!row.difference) return row.rank === 1 ? "" : "–";
    const [mean, low, high] = row.difference;
    return signed(data.by, mean) + (low === null ? "" : ` [${signed(data.by, low)}, ${signed(data.by, high)}]`);
  } };

function notEnded(row) {
  const counts = {};
  for (const run of row.runs) if (!["finished", "stopped_early"].includes(run.status)) counts[run.status] = (counts[run.status] || 0) + 1;
  const text = Object.entries(counts).map(([status, count]) => `${count} ${status}`).join(", ");
  return text ? make("small", { class: row.failed ? "bad" : "soft" }, ` ${text}`) : null;
}

function sorted(list) {
  const [id, direction] = state.sort;
  const column = list.find((each) => each.id === id) || list[0];
  const missing = (found) => found === null || found === undefined;
  return [...visible].sort((a, b) => {
    const x = column.of(a), y = column.of(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a.rank - b.rank;
    return (x < y ? -1 : x > y ? 1 : 0) * direction || a.rank - b.rank;
  });
}

function sortBy(column, update) {
  const bigger = column.id === data.by ? !data.lower : isShare(column.id);
  const first = bigger ? -1 : 1;
  state.sort = state.sort[0] === column.id ? [column.id, -state.sort[1]] : [column.id, first];
  update();
}

function leaderboard(update) {
  const list = columns(), rows = sorted(list), lines = drawn();
  const head = list.map((column) => {
    const [id, direction] = state.sort, active = id === column.id;
    return make("th", { class: (column.number ? "number" : "") + (column.key ? " key" : ""), scope: "col", title: column.full, "data-column": column.id,
      "aria-sort": active ? (direction > 0 ? "ascending" : "descending") : "none" },
      make("button", { type: "button", onclick: () => sortBy(column, update) }, column.name, active ? (direction > 0 ? " ▲" : " ▼") : ""));
  });
  const shown = state.all ? rows : rows.slice(0, PAGE);
  const table = make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "drawn"), ...head)),
    make("tbody", {}, ...shown.map((row) => line(row, list, lines, update))));
  body("leaderboard").replaceChildren(
    make("p", { class: "note" }, rankedBy()),
    make("div", { class: "scroll" }, table),
    rows.length > PAGE ? make("div", { class: "controls" }, make("button", { type: "button", onclick: () => { state.all = !state.all; update(); } },
      state.all ? `Show the first ${PAGE}` : `Show all ${rows.length}`)) : "");
  const filtered = document.getElementById("filtered");
  if (filtered) filtered.textContent = `${visible.length} of ${data.rows.length} configurations`;
}

function rankedBy() {
  const seeds = data.rows.some((row) => row.runs.length > 1);
  return `Ranked by ${title(data.by)} of the best epoch${seeds ? ": mean ± standard deviation over seeds" : ""}.` +
    (data.rows.some((row) => row.difference && row.difference[1] !== null) ? " The difference to the first is paired over seeds, with its 95 % confidence interval." : "") +
    " A click on a heading sorts, on a row chooses it.";
}

function line(row, list, lines, update) {
  const place = lines.indexOf(row);
  const box = make("input", { type: "checkbox", checked: place >= 0, "aria-label": `draw ${row.label}`, onclick: (event) => event.stopPropagation(),
    onchange: () => {
      const ids = new Set(lines.map((each) => each.id));
      if (ids.has(row.id)) ids.delete(row.id); else ids.add(row.id);
      state.drawn = [...ids];
      update();
    } });
  const cells = list.map((column) => make("td", { class: (column.number ? "number" : "") + (column.key ? " key" : "") },
    column.strong ? make("b", {}, column.text(row)) : column.text(row), column.more ? column.more(row) : null));
  return make("tr", { class: "row", tabindex: 0, "aria-selected": String(row === chosenRow()), "data-rank": row.rank,
    onclick: () => { state.chosen = row.id; update(); },
    onkeydown: (event) => { if (event.key === "Enter" && event.target.tagName === "TR") { state.chosen = row.id; update(); } } },
    make("td", {}, make("span", { class: "swatch" }, box, place >= 0 ? swatch(styleOf(place)) : null)), ...cells);
}

// -- recipes of papers

function published() {
  if (!show("published", data.published.length > 0)) return;
  const number = (text) => make("td", { class: "number" }, text);
  const rows = data.published.map(([name, measured, error]) => {
    const deviation = measured && measured[1] !== null ? ` ± ${measured[1].toFixed(2)}` : "";
    return make("tr", {}, make("td", {}, name), number(measured ? measured[0].toFixed(2) + deviation : "–"), number(error.toFixed(2)),
      number(measured ? (measured[0] - error).toFixed(2) : ""), number(measured ? String(measured[2]) : "0"));
  });
  const head = ["recipe", "test error %", "published", "difference", "runs"];
  body("published").replaceChildren(make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows))));
}

// -- the chosen configuration

function chosenRow() {
  return data.rows.find((row) => row.id === state.chosen) || data.rows[0];
}

function chosen() {
  const row = chosenRow();
  if (!show("chosen", Boolean(row))) return;
  const facts = data.metrics.map((name) => [title(name), statistic(name, row.metrics[name])]);
  for (const [name, found] of Object.entries(row.test || {})) facts.push([title(name), statistic(name, found)]);
  const shown = [...new Set([data.by, "val_loss", "best_epoch", "epochs", "seconds"])].filter((name) => row.runs.some((run) => name in run.metrics));
  const runs = row.runs.map((run) => make("tr", {},
    make("td", {}, run.path), make("td", { class: "number" }, value(run.seed)), make("td", {}, run.status.replace("_", " ")),
    ...shown.map((name) => make("td", { class: "number" }, figure(name, run.metrics[name]))),
    make("td", {}, copying(run.command, "copy command")), make("td", {}, copying(run.from, "copy from="))));
  const head = ["folder", "seed", "status", ...shown.map(title), "this run again", "by its folder"];
  body("chosen").replaceChildren(
    make("p", {}, make("b", {}, `#${row.rank} `), row.label),
    make("ul", { class: "facts" }, ...facts.map(([name, text]) => make("li", {}, `${name} `, make("b", {}, text)))),
    make("p", { class: "note" }, row.test ? (data.allTests ? "" : "The test metrics are those of the first row; the choice was made on the validation set.")
      : row.rank === 1 ? "" : "Test metrics are shown for the first row only: to choose by them would be to train on the test set. dlopt report test=true shows all."),
    row.command ? commandLine(row.command) : make("p", { class: "note" }, "What was typed for it is not known; each run can be started again from its folder."),
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...runs))));
}

function commandLine(text) {
  return make("div", { class: "command" }, make("code", {}, text), copying(text, "Copy"));
}

function copying(text, name) {
  if (!text) return "–";
  const button = make("button", { type: "button", title: text, onclick: async (event) => {
    event.stopPropagation();
    button.textContent = (await copy(text)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = name; }, 1500);
  } }, name);
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (error) {
    const area = make("textarea", {});
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
