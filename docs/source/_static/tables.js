// Tables on narrow screens. pages.css turns the rows of wide tables into blocks, in which each cell shows the head of its
// column. Long names in code may break after an underscore.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table")) {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.cells].forEach((cell, column) => {
        if (cell.textContent.trim()) cell.dataset.head = heads[column];
      });
    }
    for (const span of table.querySelectorAll("code .pre")) {
      if (span.closest("a")) continue;
      span.replaceChildren(...span.textContent.split(/(?<=_)/).flatMap((part) => [part, document.createElement("wbr")]));
    }
  }
});
