"use strict";
// Sorts a table by the column whose head is clicked, or activated with Enter or the space bar: numbers from high to low
// at first, texts from A to Z. Cells without a number stay at the end. Ties keep their order.
function number(cell) {
  const found = cell.textContent.match(/[+-]?\d+(\.\d+)?(e[+-]?\d+)?/);
  return found ? Number(found[0]) : NaN;
}

function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const numeric = head.classList.contains("number");
  const first = numeric ? "descending" : "ascending";
  const order = head.ariaSort === first ? (numeric ? "ascending" : "descending") : first;
  const sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => {
    const [x, y] = [a, b].map((row) => row.cells[column]);
    if (!numeric) return sign * x.textContent.localeCompare(y.textContent);
    const [p, q] = [number(x), number(y)];
    return Number.isNaN(p) || Number.isNaN(q) ? Number.isNaN(p) - Number.isNaN(q) : sign * (p - q);
  };
  for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
  head.ariaSort = order;
  body.append(...[...body.rows].sort(compare));
}

for (const head of document.querySelectorAll("thead th")) {
  head.tabIndex = 0;
  head.title = "Sort";
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sort(head);
  });
}
