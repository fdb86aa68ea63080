// Shared helpers: elements, formatting, colours, state, tooltip, controls. The data is untrusted: insert it only as text, never as
// HTML.
const source = document.getElementById("data");
const data = JSON.parse(source.type === "application/gzip" ? await inflated(source.textContent) : source.textContent);

for (const row of data.rows) row.id = row.runs[0].id;

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function sectionBody(section) {
  return document.querySelector(`#${section} .body`);
}

function setVisible(section, visible) {
  document.getElementById(section).hidden = !visible;
  return visible;
}

// -- numbers: texts come with the data; these are for what the pointer and the axes show

const AXES = { epoch: "epoch", step: "updates", seconds: "seconds" };

function formatNumber(value, count = 4) {
  if (value < 0) return `−${formatNumber(-value, count)}`;
  if (value !== 0 && (value < 1e-4 || value >= 1e6)) {
    return value.toExponential(count - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(count)));
}

function isPercent(name) {
  return data.percent.includes(name);
}

// Returns the unit of a text: the title of a metric in points has it.
function unitOf(name) {
  return isPercent(name) && !data.points.includes(name) ? " %" : "";
}

function formatTick(name, value) {
  return isPercent(name) ? `${formatNumber(100 * value)}${unitOf(name)}` : formatNumber(value);
}

function formatMetric(name, value) {
  return isPercent(name) ? `${value < 0 ? "−" : ""}${(100 * Math.abs(value)).toFixed(2)}${unitOf(name)}` : formatNumber(value);
}

// Formats mean ± deviation with common decimals: two digits of the deviation.
function formatSpread(name, mean, deviation) {
  if (deviation === null) return formatMetric(name, mean);
  const scale = isPercent(name) ? 100 : 1, unit = unitOf(name);
  const largest = scale * Math.max(Math.abs(mean), deviation);
  if (largest !== 0 && (largest < 1e-4 || largest >= 1e6)) return `${formatNumber(mean, 3)} ± ${formatNumber(deviation, 3)}`;
  const decimals = Math.min(Math.max(1 - Math.floor(Math.log10(scale * deviation || 0.01)), 0), 4);
  return `${mean < 0 ? "−" : ""}${(scale * Math.abs(mean)).toFixed(decimals)} ± ${(scale * deviation).toFixed(decimals)}${unit}`;
}

function formatValue(value) {
  return typeof value === "number" ? formatNumber(value) : value === undefined ? "–" : value;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null || !Number.isFinite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

// -- view state, stored in the fragment of the address, so that it survives reloads: #run=PATH&view=JSON

const DEFAULTS = { sort: ["rank", 1], off: {}, ranges: {}, where: "", group: "", colour: data.keys.includes("optimizer") ? "optimizer" : "",
  shown: null, hidden: [], compare: "", metric: null, x: "epoch", band: data.spread, singles: false, smooth: 0, log: false,
  heatX: "", heatY: "", heatCell: "best", target: null, all: false, open: null, columns: null, choosing: false,
  zooms: {} }; // zooms: chart -> {key, x: [low, high], y: [low, high] or null}
const state = { ...structuredClone(DEFAULTS), run: null };

function restoreState() {
  const saved = new URLSearchParams(location.hash.slice(1));
  state.run = saved.get("run");
  try {
    const view = JSON.parse(saved.get("view") || "{}");
    for (const key of Object.keys(DEFAULTS)) if (key in view) state[key] = view[key];
  } catch (error) { /* a fragment of another page */ }
}

// Returns the address of a run, or of all runs (null), in this view.
function addressOf(run) {
  const isChanged = ([key, value]) => key !== "run" && JSON.stringify(value) !== JSON.stringify(DEFAULTS[key]);
  const view = JSON.stringify(Object.fromEntries(Object.entries(state).filter(isChanged)));
  return `#${new URLSearchParams({ ...(run ? { run } : {}), ...(view === "{}" ? {} : { view }) })}`;
}

function saveState() {
  try {
    history.replaceState(null, "", addressOf(state.run));
  } catch (error) { /* a page without an address, such as about:srcdoc */ }
}

// -- line styles: page.css defines the colours for a light and a dark screen; a page is always printed on white

const COLOURS = 7;
const DASHES = [[], [7, 3], [2, 2], [8, 3, 2, 3]];

function styleOf(colour, dash = colour) {
  return { colour: `--c${colour % COLOURS}`, dash: DASHES[dash % DASHES.length] };
}

function swatch(style, width = 26) {
  return svg("svg", { width, height: 10, "aria-hidden": "true" }, svg("line", { x1: 1, x2: width - 1, y1: 5, y2: 5,
    stroke: `var(${style.colour})`, "stroke-width": 2.5, "stroke-dasharray": style.dash.join(" ") || null }));
}

// Returns the distinct values of a key, sorted: those of all rows, so that filters do not change their colours.
const valuesOf = cached((key) => {
  const values = [...new Map(data.rows.map((row) => [formatValue(row.values[key]), row.values[key]])).values()];
  const order = (value) => (typeof value === "number" ? [0, value] : [1, String(value)]);
  return values.sort((a, b) => compare(order(a), order(b)));
});

const colourIndex = cached((key) => new Map(valuesOf(key).map((value, i) => [formatValue(value), i])));

// Returns whether a key is filtered by a range: a searched number, or one with many values.
const isContinuous = cached((key) => valuesOf(key).length > (data.searched ? 2 : 6) && valuesOf(key).every((value) => typeof value === "number" || value === undefined));

// Returns the keys whose values several configurations share, so that groups, colours and maps of them make sense.
function sharedKeys() {
  return data.keys.filter((key) => !isContinuous(key) || 2 * valuesOf(key).length <= data.rows.length);
}

function compare([a, x], [b, y]) {
  return a - b || (x < y ? -1 : x > y ? 1 : 0);
}

function cached(compute) {
  const known = new Map();
  return (key) => known.get(key) ?? known.set(key, compute(key)).get(key);
}

// -- tooltip

const tip = document.getElementById("tip");

function showTooltip(x, y, head, lines) {
  tip.replaceChildren(html("b", {}, head), ...lines.map(([mark, left, right]) => html("div", {}, mark, html("span", {}, left), html("span", {}, right))));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  tip.style.left = `${x + gap + box.width < innerWidth - 4 ? x + gap : Math.max(4, x - gap - box.width)}px`;
  tip.style.top = `${Math.min(Math.max(4, y + gap), Math.max(4, innerHeight - box.height - 4))}px`;
}

function hideTooltip() {
  tip.hidden = true;
}

// -- tables

// Wraps a table that may be wider than the page, and shows if there are more columns than fit.
function scrollable(table, name) {
  const scroll = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": name }, table);
  const frame = html("div", { class: "frame" }, scroll, html("div", { class: "hint", "aria-hidden": "true" }, "more columns →"));
  const update = () => frame.classList.toggle("more", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 2);
  scroll.addEventListener("scroll", update);
  new ResizeObserver(update).observe(scroll);
  return frame;
}

function tableOf(heads, rows) {
  return html("table", {}, html("thead", {}, html("tr", {}, ...heads.map(([name, kind]) => html("th", { scope: "col", class: kind || null }, name)))), html("tbody", {}, ...rows));
}

// -- controls

function selectControl(name, label, options, update) {
  return html("label", {}, `${label} `, html("select", { "data-choice": name, onchange: (event) => { state[name] = event.target.value; update(); } },
    ...Object.entries(options).map(([key, text]) => html("option", { value: key, selected: state[name] === key }, text))));
}

function checkControl(name, label, update) {
  return html("label", {}, html("input", { type: "checkbox", id: name, checked: state[name],
    onchange: (event) => { state[name] = event.target.checked; update(); } }), label);
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

function commandLine(command) {
  return html("div", { class: "command" }, html("code", {}, command), copyButton(command, "Copy"));
}
