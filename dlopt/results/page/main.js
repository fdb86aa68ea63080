// Renders the page.

function renderFailures(update) {
  const runs = data.runs.filter((run) => ["failed", "unfinished"].includes(run.status));
  if (!setVisible("failed", runs.length > 0)) return;
  const reason = (run) => run.reason || (run.status === "unfinished" ? "no summary: the process was killed or the machine went down" : "no reason recorded");
  const rows = runs.slice(0, state.all ? runs.length : PAGE).map((run) => html("tr", {}, html("td", {}, run.path), html("td", { class: "wrap" }, data.rows[run.row].label), html("td", { class: "number" }, formatValue(run.seed)),
    html("td", { class: "wrap" }, reason(run)), html("td", {}, copyButton(run.command || run.from, "copy command"))));
  sectionBody("failed").replaceChildren(scrollable(tableOf([["folder"], ["configuration"], ["seed", "number"], ["reason"], ["repeat run"]], rows), "Failed and unfinished runs"), allButton(runs.length, PAGE, update));
}

function renderDamaged() {
  if (!setVisible("damaged", data.damaged.length > 0)) return;
  sectionBody("damaged").replaceChildren(html("p", { class: "note" }, "Excluded from all tables and plots."), html("ul", {}, ...data.damaged.map(([path, reason]) => html("li", {}, html("code", {}, path), `: ${reason}`))));
}

function render() {
  hideTooltip();
  visible = data.rows.filter(matchesFilters);
  renderLeaderboard(render);
  renderSelected();
  renderPublished();
  renderCurves(render);
  renderLearningRates(render);
  renderSensitivity();
  renderImportance();
  renderParallel();
  renderTimes(render);
  renderFailures(render);
  saveState();
}

for (const [i, row] of data.rows.entries()) {
  row.rank = i + 1;
  row.runs = [];
}
for (const run of data.runs) data.rows[run.row].runs.push(run);
for (const row of data.rows) row.distinct = row.runs.filter((run) => !run.repeats); // repetitions would narrow intervals
restoreState();
document.title = data.title;
document.getElementById("title").textContent = data.title;
document.getElementById("counts").textContent = `${count(data.rows.length, "configuration")}, ${count(data.runs.length, "run")}: ` +
  Object.entries(data.counts).map(([status, number]) => `${number} ${status.replace("_", " ")}`).join(", ");
document.getElementById("footer").textContent = `dlopt ${data.version}, ${data.made}` + (data.refresh ? `; reloads every ${data.refresh} s` : "");
if (data.rows.length) {
  renderFilters(render);
  render();
} else {
  for (const section of document.querySelectorAll("main section")) section.hidden = true;
}
renderDamaged();
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width && !isPrinting) [width] = [innerWidth, render()];
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);

// Canvases are drawn again for paper: on white, at its width, and sharp.
function setPrinting(value) {
  isPrinting = value;
  document.documentElement.classList.toggle("printing", value);
  render();
}
addEventListener("beforeprint", () => setPrinting(true));
addEventListener("afterprint", () => setPrinting(false));
if (data.refresh) setInterval(() => { if (!document.hidden && !document.activeElement.matches("input, select, .plot")) location.reload(); }, 1000 * data.refresh);
