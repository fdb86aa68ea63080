// Putting the page together.

function failures() {
  const runs = data.runs.filter((run) => ["failed", "unfinished"].includes(run.status));
  if (!show("failed", runs.length > 0)) return;
  const why = (run) => run.reason || (run.status === "unfinished" ? "it ended without a summary: killed, or the machine went down" : "no reason was recorded");
  const rows = runs.slice(0, state.all ? runs.length : PAGE).map((run) => make("tr", {}, make("td", {}, run.path), make("td", { class: "wrap" }, data.rows[run.row].label), make("td", { class: "number" }, value(run.seed)),
    make("td", { class: "wrap" }, why(run)), make("td", {}, copying(run.command || run.from, "copy command"))));
  body("failed").replaceChildren(make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...["folder", "configuration", "seed", "why", "run it again"].map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows))),
    runs.length > rows.length ? make("p", { class: "note" }, `and ${runs.length - rows.length} more; “show all” above shows them`) : "");
}

function damaged() {
  if (!show("damaged", data.damaged.length > 0)) return;
  body("damaged").replaceChildren(make("p", { class: "note" }, "Not in the metrics above."), make("ul", {}, ...data.damaged.map(([path, why]) => make("li", {}, make("code", {}, path), `: ${why}`))));
}

function render() {
  hush();
  refilter();
  leaderboard(render);
  chosen();
  published();
  curves(render);
  rates(render);
  sensitivity();
  importance();
  parallel();
  times(render);
  failures();
  keep();
}

for (const [i, row] of data.rows.entries()) {
  row.rank = i + 1;
  row.runs = [];
}
for (const run of data.runs) data.rows[run.row].runs.push(run);
restore();
document.title = data.title;
document.getElementById("title").textContent = data.title;
document.getElementById("counts").textContent = `${data.rows.length} configurations, ${data.runs.length} runs: ` +
  Object.entries(data.counts).map(([status, count]) => `${count} ${status.replace("_", " ")}`).join(", ");
document.getElementById("footer").textContent = `dlopt ${data.version}, ${data.made}` + (data.refresh ? `; this page loads itself anew every ${data.refresh} s` : "");
if (data.rows.length) {
  filters(render);
  render();
} else {
  for (const section of document.querySelectorAll("main section")) section.hidden = true;
}
damaged();
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) [width] = [innerWidth, render()];
});
if (data.refresh) setInterval(() => { if (!document.hidden && !document.activeElement.matches("input, select")) location.reload(); }, 1000 * data.refresh);
