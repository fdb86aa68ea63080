// Sorts tables with at least five rows by a click on the head of a column: numbers by value, the rest by alphabet.
// Marks the cells with sentences in tables that scroll on a phone: their columns are wide there (site.css).
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table.docutils")) {
    const body = table.tBodies[0];
    for (const cell of table.querySelectorAll("tr:has(td:nth-child(4)) td"))
      cell.classList.toggle("long", cell.textContent.length > 80);
    if (!table.tHead || !body || body.rows.length < 5) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort by this column";
      button.append(...head.firstElementChild?.matches("p") ? head.firstElementChild.childNodes : head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => sort(table, body, head, column));
    });
  }
});

function sort(table, body, head, column) {
  const rows = [...body.rows].map((row) => ({ row, text: row.cells[column].textContent.trim() }));
  const given = rows.filter(({ text }) => text && text !== "-"); // a cell without a value stays at the end
  const isNumeric = given.every(({ text }) => Number.isFinite(number(text)));
  const compare = isNumeric ? (a, b) => number(a.text) - number(b.text) : (a, b) => a.text.localeCompare(b.text);
  const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  given.sort(direction === "ascending" ? compare : (a, b) => compare(b, a));
  const empty = rows.filter((each) => !given.includes(each));
  body.append(...[...given, ...empty].map(({ row }) => row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
}

// The number with which a text begins: 0.71 of "0.71 [0.56, 0.74]", 1250 of "1,250", -12.8 of "-12.8 %".
function number(text) {
  const found = text.replace(/(\d),(?=\d{3}\b)/g, "$1").match(/^[-+]?\d*\.?\d+(e[-+]?\d+)?/);
  return found ? Number(found[0]) : NaN;
}
