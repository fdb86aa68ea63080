// Shared helpers: elements, formatting, colours, state, tooltip. The data is untrusted: insert it only as text, never as
// HTML.
const data = JSON.parse(document.getElementById("data").textContent);

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
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) {
    return value.toExponential(count - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(count)));
}

function formatTick(name, value) {
  return data.percent.includes(name) ? `${formatNumber(100 * value)} %` : formatNumber(value);
}

function formatMetric(name, value) {
  return data.percent.includes(name) ? `${(100 * value).toFixed(2)} %` : formatNumber(value);
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

// -- view state, stored in the URL hash so that it survives reloads

const state = { sort: ["rank", 1], off: {}, range: {}, shown: null, hidden: [], selected: null, metric: null, x: "epoch",
  band: data.spread, log: false, target: null, all: false, open: null, columns: null, choosing: false, zooms: {} }; // zooms: chart -> {key, x: [low, high], y: [low, high] or null}

function restoreState() {
  try {
    const saved = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    for (const key of Object.keys(state)) if (key in saved) state[key] = saved[key];
  } catch (error) { /* no saved state, or a hash of another page */ }
}

function saveState() {
  try {
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(state))}`);
  } catch (error) { /* a page without a URL, such as about:srcdoc */ }
}

// -- line styles: page.css defines the colours for a light and a dark screen; a page is always printed on white

const COLOURS = 7;
const DASHES = [[], [7, 3], [2, 2], [8, 3, 2, 3]];
let isPrinting = false;

function styleOf(i) {
  return { colour: `--c${i % COLOURS}`, dash: DASHES[i % DASHES.length] };
}

// Returns the value of a colour for a canvas, which knows no CSS variables.
function colourOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name);
}

function swatch(style, width = 26) {
  return svg("svg", { width, height: 10, "aria-hidden": "true" }, svg("line", { x1: 1, x2: width - 1, y1: 5, y2: 5,
    stroke: `var(${style.colour})`, "stroke-width": 2.5, "stroke-dasharray": style.dash.join(" ") || null }));
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
