// Shared helpers: elements, formatting, scales, state. The data is untrusted: insert it only as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
// Okabe & Ito 2008, without their yellow.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"];
const DASHES = ["", "7 3", "2 2", "8 3 2 3"];

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

// -- metrics

const NAMES = { lr: "learning rate", epoch: "epoch", step: "updates", seconds: "seconds" };

function metricTitle(name) {
  return NAMES[name] || name.replace(/^val_/, "validation ").replace(/^train_/, "training ").replaceAll("_", " ");
}

function formatNumber(value, count = 4) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) {
    return value.toExponential(count - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(count)));
}

function isFraction(name) {
  return name.includes("accuracy");
}

function formatMetric(name, value) {
  if (value === null || value === undefined) return "–";
  if (isFraction(name)) return `${(100 * value).toFixed(2)} %`;
  if (name === "seconds") return value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value).toLocaleString("en")} s`;
  return name.endsWith("loss") ? value.toFixed(Math.abs(value) < 100 ? 4 : 1) : formatNumber(value);
}

// [mean, std, count] -> 95.9 ± 0.3 %
function formatStatistic(name, values) {
  if (!values) return "–";
  const [mean, std] = values;
  if (!std) return formatMetric(name, mean);
  if (isFraction(name)) return `${(100 * mean).toFixed(2)} ± ${(100 * std).toFixed(2)} %`;
  if (name.endsWith("loss")) return `${formatMetric(name, mean)} ± ${formatMetric(name, std)}`;
  const unit = name === "seconds" ? " s" : "";
  return `${formatMetric(name, mean).replace(unit, "")} ± ${formatNumber(std, 2)}${unit}`;
}

// Formats differences with a sign; those of accuracies are in percentage points, without a unit.
function formatDifference(name, value) {
  return (value > 0 ? "+" : value < 0 ? "−" : "±") + formatMetric(name, Math.abs(value)).replace(" %", "");
}

function formatValue(value) {
  return typeof value === "number" ? formatNumber(value) : value === undefined ? "–" : String(value);
}

// -- view state, stored in the URL hash so that it survives reloads

const state = { sort: ["rank", 1], off: {}, range: {}, shown: null, hidden: [], selected: null, metric: null, x: "epoch",
  band: null, log: false, target: data.target, all: false, open: null };

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

// -- scales and axes

function linear(low, high, from, to) {
  const scale = (x) => from + ((x - low) / (high - low || 1)) * (to - from);
  scale.invert = (position) => low + ((position - from) / (to - from)) * (high - low);
  scale.ticks = (count) => {
    const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
    return ticks;
  };
  return scale;
}

function logarithmic(low, high, from, to) {
  const inner = linear(Math.log10(low), Math.log10(high), from, to);
  const scale = (x) => inner(Math.log10(x));
  scale.invert = (position) => 10 ** inner.invert(position);
  scale.ticks = (count) => {
    const decades = Math.log10(high / low), marks = decades < 1.5 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(decades / count));
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      if (power % every === 0) for (const mark of marks) ticks.push(Number((mark * 10 ** power).toPrecision(6)));
    }
    return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  };
  return scale;
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

// -- tooltip

const tip = document.getElementById("tip");

function showTooltip(event, head, lines) {
  tip.replaceChildren(html("b", {}, head), ...lines.map(([mark, left, right]) => html("div", {}, mark, html("span", {}, left), html("span", {}, right))));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const right = event.clientX + gap + box.width < innerWidth - 4;
  const x = right ? event.clientX + gap : Math.max(4, event.clientX - gap - box.width);
  const y = Math.min(Math.max(4, event.clientY + gap), Math.max(4, innerHeight - box.height - 4));
  tip.style.left = `${x}px`;
  tip.style.top = `${y}px`;
}

function hideTooltip() {
  tip.hidden = true;
}

function swatch(style, width = 26) {
  return svg("svg", { width, height: 10, "aria-hidden": "true" },
    svg("line", { x1: 1, x2: width - 1, y1: 5, y2: 5, stroke: style.colour, "stroke-width": 2.5, "stroke-dasharray": style.dash }));
}

function styleOf(i) {
  return { colour: COLOURS[i % COLOURS.length], dash: DASHES[i % DASHES.length] };
}
