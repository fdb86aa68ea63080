// Filters: text and conditions as in `dlopt runs`, check boxes; what is plotted, in which style; groups.

const SHOWN = 6; // configurations shown by default
const IS_SINGLE = data.rows.length === 1 && data.rows[0].runs.length === 1; // shown as a run: nothing is ranked
const PAGE = 20; // rows of a table without "Show all"
const CONDITION = /^([\w./-]+?)(!=|>=|<=|=|>|<)(.*)$/;
const ORDER = { ">": (a, b) => a > b, ">=": (a, b) => a >= b, "<": (a, b) => a < b, "<=": (a, b) => a <= b };

let visible = []; // rows that match the filters

// Returns the tests of the words of a filter, and what is wrong with other words, such as unfinished ones: they hide no row.
function parseFilter(text) {
  const tests = [], problems = [];
  for (const word of text.split(/\s+/).filter(Boolean)) {
    const [, key, sign, value] = word.match(CONDITION) || [], inLabel = (row) => `${row.label} ${row.typed}`.toLowerCase().includes(word.toLowerCase());
    if (!key) (data.rows.some(inLabel) ? tests.push(inLabel) : problems.push(`${word}: in no label${suggestion(word, knownKeys(), "key ")}`));
    else if (!data.rows.some((row) => rowValues(row, key).length)) problems.push(`${word}: unknown key ${key}${suggestion(key, knownKeys())}`);
    else if (sign in ORDER && numberIn(value) === null) problems.push(`${word}: ${sign} needs a number`);
    else {
      const own = data.rows.flatMap((row) => rowValues(row, key)), longer = own.find((each) => !holds([each], "=", value) && String(each).startsWith(value));
      if (sign === "=" && longer !== undefined && !holds(own, sign, value)) problems.push(`${word}: no such value; did you mean ${longer}?`);
      else tests.push((row) => holds(rowValues(row, key), sign, value));
    }
  }
  return { tests, problems };
}

// Returns what conditions may begin with: keys of the table, metrics, and what runs have.
function knownKeys() {
  return [...data.keys, ...data.columns.filter((column) => "higher" in column).map(({ id }) => id), "runs", "status", "tags", "note"];
}

// Returns "; did you mean NAME?" for the most similar name, or one that begins with the word; "" if none is similar.
function suggestion(word, names, kind = "") {
  const distance = (name) => Math.min(edits(word, name), edits(word, name.slice(0, word.length)), edits(word, name.split(".").at(-1))) / word.length;
  const best = names.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  return distance(best) <= 0.4 ? `; did you mean ${kind}${best}?` : "";
}

// Returns the number of edits between two words (Levenshtein).
function edits(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) next.push(Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1])));
    row = next;
  }
  return row.at(-1);
}

// Returns the values of a key, metric or status in the runs of a row; a key may be shortened to its last part.
function rowValues(row, key) {
  const known = data.keys.filter((each) => each === key || each.endsWith(`.${key}`));
  if (known.length) return known.slice(0, 1).filter((each) => each in row.values).map((each) => row.values[each]);
  if (row.cells[key]) return row.cells[key][0] === null ? [] : [row.cells[key][0]];
  if (key === "status") return row.runs.map((run) => run.status.replaceAll(" ", "_"));
  if (key === "tags" || key === "note") return row.facts.filter(([name]) => name === key).flatMap(([, text]) => text.split(", "));
  return row.runs.map((run) => run.config[key] ?? data.config[key]).filter((value) => value !== undefined);
}

function holds(values, sign, wanted) {
  const number = numberIn(wanted);
  if (sign in ORDER) return values.some((value) => numberIn(value) !== null && ORDER[sign](numberIn(value), number));
  const pattern = new RegExp(`^${wanted.replace(/[.+^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*").replaceAll("?", ".")}$`);
  const isEqual = (value) => (number !== null && numberIn(value) !== null ? numberIn(value) === number : pattern.test(String(value)));
  return values.some(isEqual) === (sign === "=");
}

// Returns the number in a text: 0.9 for 90%; null if it is not a number.
function numberIn(value) {
  if (typeof value === "number") return value;
  const isPart = value.endsWith("%"), text = isPart ? value.slice(0, -1) : value;
  return text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) / (isPart ? 100 : 1) : null;
}

function isFiltered() {
  return state.where.trim() !== "" || [...Object.values(state.off), ...Object.values(state.ranges)].some((each) => each.some((value) => value !== null));
}

function isInRange(key, value) {
  const [low, high] = state.ranges[key] || [null, null];
  return (low === null && high === null) || (typeof value === "number" && value >= (low ?? -Infinity) && value <= (high ?? Infinity));
}

function filterRows() {
  const { tests, problems } = parseFilter(state.where), field = document.getElementById("where");
  visible = data.rows.filter((row) => tests.every((test) => test(row))
    && data.keys.every((key) => !(state.off[key] || []).includes(formatValue(row.values[key])) && isInRange(key, row.values[key])));
  if (!field) return;
  field.setAttribute("aria-invalid", String(problems.length > 0));
  document.getElementById("problem").textContent = problems.join("; ");
  document.getElementById("filtered").textContent = isFiltered() ? `${visible.length} of ${data.rows.length} configurations${visible.length < data.rows.length ? "; verdict, ranks and differences are of all" : ""}` : "";
  document.getElementById("clear").hidden = !isFiltered();
  document.getElementById("nothing").hidden = visible.length > 0;
}

function renderFilters(update) {
  const section = document.getElementById("filters"), list = html("datalist", { id: "keys" });
  const field = html("input", { type: "text", id: "where", value: state.where, list: "keys", spellcheck: "false", autocomplete: "off", "aria-describedby": "problem",
    placeholder: `${data.by}${data.lower ? "<0.1" : ">0.9"} ${data.keys[0] ? `${data.keys[0]}=…` : ""}`,
    oninput: () => { state.where = field.value; suggest(); update(); } });
  // Offers the keys for the last word, after the words before it.
  const suggest = () => list.replaceChildren(...knownKeys().map((key) => html("option", { value: field.value.replace(/\S*$/, key) })));
  const details = html("details", { open: state.open ?? isFiltered(), ontoggle: () => { state.open = details.open; saveState(); } },
    html("summary", {}, "Filters ", html("span", { class: "soft", id: "filtered" })),
    html("div", { class: "controls" }, html("label", { class: "long" }, "conditions ", field), list, html("span", { id: "problem", class: "bad", role: "status" })),
    html("div", { class: "groups" }, ...data.keys.map((key) => (isContinuous(key) ? rangeFilter(key, update) : valueFilter(key, update)))));
  const clear = () => {
    [state.off, state.ranges, state.where] = [{}, {}, ""];
    renderFilters(update);
    update();
  };
  const keys = Object.fromEntries(sharedKeys().map((key) => [key, key]));
  suggest();
  section.hidden = !data.keys.length;
  section.replaceChildren(html("div", { class: "filterbar" }, details, html("button", { type: "button", id: "clear", hidden: true, onclick: clear }, "Clear filters"),
    selectControl("colour", "colour by", { "": "configuration", ...keys }, update), selectControl("group", "group by", { "": "nothing", ...keys }, update)),
  html("p", { id: "nothing", hidden: true }, "No configuration matches the filters. ", html("button", { type: "button", onclick: clear }, "Clear filters")));
}

// Returns two fields for the range of a key with many numbers.
function rangeFilter(key, update) {
  const ends = extent(valuesOf(key).map((value) => value ?? null)), range = state.ranges[key] || [null, null];
  const fields = ["from", "to"].map((name, i) => html("input", { type: "number", step: "any", "data-range": `${key} ${name}`, "aria-label": `${key} ${name}`,
    value: range[i], placeholder: formatNumber(ends[i]), oninput: (event) => {
      range[i] = event.target.value === "" ? null : Number(event.target.value);
      state.ranges[key] = range;
      update();
    } }));
  return html("fieldset", {}, html("legend", {}, key), html("div", { class: "range" }, fields[0], " to ", fields[1]));
}

// Returns a check box per value of a key.
function valueFilter(key, update) {
  const boxes = valuesOf(key).map(formatValue).map((text) => {
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
}

// -- what is plotted

// Returns the plotted configurations with their slots, which a configuration keeps when others are added or removed, and
// their styles: the colour of the configuration, or of its value of the chosen key; dashes tell equal colours apart.
function plottedRows() {
  const ranked = visible.filter((row) => row.ranked);
  const slots = state.shown === null ? (ranked.length ? ranked : visible).slice(0, SHOWN).map((row) => row.id) : state.shown;
  const rows = new Map(visible.map((row) => [row.id, row])), counts = {};
  return slots.map((id, slot) => ({ row: rows.get(id), slot })).filter(({ row }) => row).map(({ row, slot }) => {
    const colour = colourOf(row, slot), dash = state.colour ? (counts[colour % COLOURS] = (counts[colour % COLOURS] ?? -1) + 1) : slot;
    return { row, slot, style: styleOf(colour, dash) };
  });
}

function colourOf(row, slot) {
  return state.colour ? colourIndex(state.colour).get(formatValue(row.values[state.colour])) : slot;
}

// Returns the style of a row that need not be plotted; null: no colour belongs to it.
function styleOfRow(row) {
  if (state.colour) return styleOf(colourOf(row), 0);
  return plottedRows().find((entry) => entry.row === row)?.style ?? null;
}

function togglePlotted(row) {
  const plotted = plottedRows(), slots = [];
  for (const entry of plotted) slots[entry.slot] = entry.row.id;
  const slot = slots.indexOf(row.id), free = [...slots, undefined].findIndex((id) => id === undefined);
  slots[slot >= 0 ? slot : free] = slot >= 0 ? null : row.id;
  state.shown = Array.from(slots, (id) => id ?? null);
}

// -- groups: the configurations that match the filters, by their value of a key

// Returns the groups, the one with the best mean first.
function groups() {
  const found = new Map();
  for (const row of visible) {
    const value = formatValue(row.values[state.group]);
    found.set(value, [...(found.get(value) || []), row]);
  }
  const sign = data.lower ? 1 : -1, middle = (group) => (known(group.rows, data.by).length ? sign * mean(known(group.rows, data.by)) : Infinity);
  return [...found].map(([value, rows]) => ({ value, rows })).sort((a, b) => middle(a) - middle(b));
}

// Returns the means of a metric that rows have.
function known(rows, column) {
  return rows.map((row) => row.cells[column]?.[0] ?? null).filter((value) => value !== null);
}

function renderGroups() {
  if (!setVisible("groups", state.group !== "")) return;
  const metrics = data.columns.filter((column) => "higher" in column), count = (number) => html("td", { class: "number" }, String(number));
  const rows = groups().map((group) => html("tr", {}, html("td", {}, group.value), count(group.rows.length), count(group.rows.reduce((sum, row) => sum + row.runs.length, 0)),
    ...metrics.flatMap(({ id }) => {
      const values = known(group.rows, id), best = data.lower ? Math.min(...values) : Math.max(...values);
      const spread = html("td", { class: "number" }, values.length ? formatSpread(id, mean(values), deviation(values)) : "–");
      return id === data.by ? [spread, html("td", { class: "number" }, html("b", {}, values.length ? formatMetric(id, best) : "–"))] : [spread];
    })));
  const heads = [[state.group], ["configurations", "number"], ["runs", "number"],
    ...metrics.flatMap(({ id, name }) => (id === data.by ? [[name, "number"], [`best ${name}`, "number"]] : [[name, "number"]]))];
  sectionBody("groups").replaceChildren(scrollable(tableOf(heads, rows), "Groups"),
    html("p", { class: "note" }, "Mean ± standard deviation over the configurations of a group that match the filters. The learning curves show the groups, too."));
}
