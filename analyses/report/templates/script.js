"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].textContent;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.className = "sort";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = head.classList.contains("n");
      const order = (a, b) => {
        if (!numeric) return sign * key(a, column).localeCompare(key(b, column), "en", { numeric: true });
        const x = parseFloat(key(a, column)), y = parseFloat(key(b, column));
        return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);  // rows without a number come last
      };
      rows.sort(order);
      body.append(...rows);
    });
  });
  const filters = document.querySelector(`.filters[data-for="${table.id}"]`);
  if (!filters) continue;
  const count = filters.querySelector("output"), search = filters.querySelector("input");
  const selects = [...filters.querySelectorAll("select")];
  const apply = () => {
    let shown = 0;
    for (const row of rows) {
      const matches = selects.every((s) => !s.value || key(row, Number(s.dataset.column)) === s.value)
        && row.textContent.toLowerCase().includes(search.value.toLowerCase());
      row.hidden = !matches;
      shown += matches;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  filters.addEventListener("input", apply);
  filters.hidden = false;
  apply();
}
