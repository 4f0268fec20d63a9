"use strict";
(() => {
  const table = document.getElementById("tensors");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];

  // Numbers by value, the rest by text; what was not measured comes last either way.
  const keyOf = (cell) => (cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value.replace("inf", "Infinity")));
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = rows.some((row) => row.cells[column].dataset.value !== undefined);
      const before = heading.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : numeric;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const keyed = rows.map((row) => [keyOf(row.cells[column]), row]);
      keyed.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return descending ? compare(b, a) : compare(a, b);
      });
      body.append(...keyed.map(([, row]) => row));
    });
  });

  const query = document.getElementById("query");
  const treatment = document.getElementById("treatment");
  const shown = document.getElementById("shown");
  const filter = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const name = row.cells[0].textContent.toLowerCase();
      const keep = words.every((word) => name.includes(word)) && (!treatment.value || row.cells[1].textContent === treatment.value);
      row.hidden = !keep;
      count += keep;
    }
    shown.textContent = `${count} of ${rows.length}`;
  };
  query.addEventListener("input", filter);
  treatment.addEventListener("input", filter);
  query.form.addEventListener("submit", (event) => event.preventDefault());

  const spectrum = document.getElementById("spectrum");
  spectrum?.addEventListener("input", () => {
    for (const option of spectrum.options) document.getElementById(option.value).hidden = !option.selected;
  });
})();
