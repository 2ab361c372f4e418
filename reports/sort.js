// Sort a table by the column whose heading is activated: numbers and times (h:mm, h:mm:ss) by value, dashes last.
document.querySelectorAll("thead button").forEach((button) => button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const column = [...head.parentNode.cells].indexOf(head), down = head.ariaSort === "ascending";
  const value = (row) => {
    const text = row.cells[column].textContent.trim().replace(/\u2212/g, "-").replace(/,/g, "");
    const time = /^(\d+):(\d\d)(?::(\d\d))?/.exec(text);
    if (time) return 3600 * time[1] + 60 * time[2] + 1 * (time[3] || 0);
    const number = parseFloat(text);
    return text === "\u2014" || text === "" ? null : Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a === typeof b && typeof a === "number" ? a - b : String(a).localeCompare(String(b));
  const rows = [...body.rows].map((row) => [value(row), row]);
  const known = rows.filter(([key]) => key !== null).sort(([a], [b]) => (down ? -1 : 1) * compare(a, b));
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  head.ariaSort = down ? "descending" : "ascending";
  body.append(...[...known, ...rows.filter(([key]) => key === null)].map(([, row]) => row));
}));
