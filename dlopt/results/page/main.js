// Renders the page: all runs, or one of them.

function renderFailures(update) {
  if (!setVisible("failed", data.failed.length > 0)) return;
  const runs = new Map(data.rows.flatMap((row) => row.runs.map((run) => [run.id, run])));
  const rows = data.failed.slice(0, state.all ? data.failed.length : PAGE).map(([id, label, seed, reason, command]) => html("tr", {},
    html("td", {}, html("a", { href: addressOf(id) }, id)), html("td", { class: "wrap" }, label), html("td", { class: "number" }, seed), html("td", { class: "wrap" }, reason),
    html("td", {}, copyButton(command, "Copy command"), ...(runs.get(id)?.sections || []).filter((section) => section.urgent && section.command).map((section) => copyButton(section.command, `Copy command: ${section.title}`)))));
  sectionBody("failed").replaceChildren(scrollable(tableOf([["folder"], ["configuration"], ["seed", "number"], ["reason"], ["repeat or examine"]], rows), "Failed and unfinished runs"), allButton(data.failed.length, PAGE, update));
}

const FILTERED = ["versus", "groups", "leaderboard", "curves", "rates", "heat", "parallel", "times"]; // empty if no row matches

function render() {
  const restoreFocus = keepFocus();
  hideTooltip();
  filterRows();
  if (IS_SINGLE) state.run ??= data.rows[0].runs[0].id;
  const found = runOf(state.run);
  document.body.dataset.view = state.run === null ? "all" : "run";
  renderConfiguration(found ? found.row : data.rows[0], found && found.run);
  if (state.run === null) renderAll();
  else renderRun(found, render);
  saveState();
  restoreFocus();
}

function renderAll() {
  for (const section of visible.length ? [] : FILTERED) {
    setVisible(section, false);
    sectionBody(section).replaceChildren();
  }
  if (!visible.length) return;
  renderVersus(render);
  renderLeaderboard(render);
  renderGroups();
  renderCurves(render);
  renderLearningRates(render);
  renderSensitivity();
  renderHeatMap(render);
  renderParallel();
  renderTimes(render);
  renderFailures(render);
}

// Returns a function that gives the focus back to the control that has it, which rendering replaces.
function keepFocus() {
  const section = document.activeElement?.closest("section"), controls = () => [...section.querySelectorAll("a, button, input, select, summary, .plot")];
  const index = section ? controls().indexOf(document.activeElement) : -1;
  return () => { if (index >= 0) controls()[index]?.focus({ preventScroll: true }); };
}

restoreState();
if (data.rows.length) {
  renderFilters(render);
  render();
}
addEventListener("hashchange", () => {
  const before = state.run;
  restoreState();
  renderFilters(render);
  render();
  if (state.run !== before) scrollTo(0, 0);
});
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width && !isPrinting) [width] = [innerWidth, render()];
});

// Charts are drawn again for paper: on white and at its width.
function setPrinting(value) {
  isPrinting = value;
  document.documentElement.classList.toggle("printing", value);
  render();
}
addEventListener("beforeprint", () => setPrinting(true));
addEventListener("afterprint", () => setPrinting(false));
if (data.refresh) setInterval(() => { if (!document.hidden && !document.activeElement.matches("input, select, .plot")) location.reload(); }, 1000 * data.refresh);
