// Renders the page.

function renderFailures(update) {
  if (!setVisible("failed", data.failed.length > 0)) return;
  const rows = data.failed.slice(0, state.all ? data.failed.length : PAGE).map(([path, label, seed, reason, command]) => html("tr", {}, html("td", {}, path),
    html("td", { class: "wrap" }, label), html("td", { class: "number" }, seed), html("td", { class: "wrap" }, reason), html("td", {}, copyButton(command, "copy command"))));
  sectionBody("failed").replaceChildren(scrollable(tableOf([["folder"], ["configuration"], ["seed", "number"], ["reason"], ["repeat run"]], rows), "Failed and unfinished runs"), allButton(data.failed.length, PAGE, update));
}

function render() {
  hideTooltip();
  visible = data.rows.filter(matchesFilters);
  setVisible("leaderboard", true);
  renderLeaderboard(render);
  renderSelected();
  renderCurves(render);
  renderLearningRates(render);
  renderSensitivity();
  renderParallel();
  renderTimes(render);
  renderFailures(render);
  saveState();
}

restoreState();
if (data.rows.length) {
  renderFilters(render);
  render();
}
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
