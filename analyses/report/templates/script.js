"use strict";
// Folded parts open when a link leads into them, and for printing.
const open = (element) => {
  for (let part = element && element.querySelector("details") || element; part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
  }
};
const follow = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target) { open(target); target.scrollIntoView(); }
};
addEventListener("hashchange", follow);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));

// Regions that scroll show an edge where there is more, and only they take the focus.
const mark = (region) => {
  const rest = region.scrollWidth - region.clientWidth, more = region.scrollHeight - region.clientHeight;
  region.toggleAttribute("data-left", region.scrollLeft > 1);
  region.toggleAttribute("data-right", rest - region.scrollLeft > 1);
  if (rest > 1 || more > 1) region.tabIndex = 0; else region.removeAttribute("tabindex");
};
const resized = new ResizeObserver((entries) => requestAnimationFrame(() => entries.forEach((entry) => mark(entry.target))));
for (const region of document.querySelectorAll(".scroll")) {
  region.addEventListener("scroll", () => mark(region), { passive: true });
  resized.observe(region);
}

// The text of the point or cell under the pointer.
const tip = document.getElementById("tip");
const show = (event) => {
  const text = event.target.dataset && event.target.dataset.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, room))}px`;
  tip.style.top = `${event.clientY > tip.offsetHeight + 24 ? event.clientY - tip.offsetHeight - 12 : event.clientY + 20}px`;
};
addEventListener("pointermove", show);
addEventListener("pointerdown", show);
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

for (const button of document.querySelectorAll("button.copy")) {
  const code = button.previousElementSibling;
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {  // without access to the clipboard the text is selected, ready for the keyboard
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].textContent;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = head.classList.contains("n");
      const number = (row) => parseFloat(key(row, column).replace("\u2212", "-").replaceAll(",", ""));
      const order = (a, b) => {
        if (!numeric) return sign * key(a, column).localeCompare(key(b, column), "en", { numeric: true });
        const x = number(a), y = number(b);
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
follow();
