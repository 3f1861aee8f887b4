"use strict";
// The tables of samples: find, show, sort, and step through by the arrow keys. Text stays text: nothing is parsed.
document.body.classList.add("scripted");
for (const box of document.querySelectorAll(".samples")) {
  const body = box.querySelector("tbody"), rows = [...body.rows], form = box.querySelector("form");
  const find = form.querySelector(".find"), which = form.querySelector(".which"), order = form.querySelector(".order");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const place = new Map(rows.map((row, number) => [row, number]));
  let here = null;

  const wanted = (row) => {
    const score = row.dataset.score === undefined ? null : Number(row.dataset.score);
    if (which.value === "high" && !(score !== null && score >= 1)) return false;
    if (which.value === "low" && !(score !== null && score < 1)) return false;
    if (which.value === "none" && score !== null) return false;
    return texts.get(row).includes(find.value.toLowerCase());
  };
  const update = () => {
    const key = order.value.replace("-", ""), sign = order.value.startsWith("-") ? -1 : 1;
    const value = (row) => (row.dataset[key] === undefined ? -Infinity : Number(row.dataset[key]));
    rows.sort((a, b) => sign * (value(a) - value(b)) || place.get(a) - place.get(b));
    body.append(...rows);
    let count = 0;
    for (const row of rows) { row.hidden = !wanted(row); count += !row.hidden; }
    form.querySelector("output").textContent = `${count} of ${rows.length}`;
  };
  const go = (row) => {
    if (!row) return;
    if (here) here.classList.remove("here");
    here = row;
    here.classList.add("here");
    here.focus({ preventScroll: true });
    here.scrollIntoView({ block: "nearest" });
  };
  const along = (list, by) => list[Math.max(0, Math.min(list.length - 1, list.indexOf(here) + by))];

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  body.addEventListener("click", (event) => { if (!event.target.closest("summary") && !String(getSelection())) go(event.target.closest("tr")); });
  box.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (event.target.closest("input, select") && !(event.target === find && event.key === "ArrowDown")) return;
    if (event.key === "Enter" && here) here.querySelectorAll("details").forEach((part) => { part.open = !part.open; });
    if (!by) return;
    event.preventDefault();
    const seen = rows.filter((row) => !row.hidden);
    if (!here || here.hidden) return go(seen[0]);
    const prompt = (row) => row.querySelector(".prompt").textContent;
    const same = event.key === "ArrowLeft" || event.key === "ArrowRight";
    const list = same ? seen.filter((row) => prompt(row) === prompt(here)).sort((a, b) => a.dataset.step - b.dataset.step) : seen;
    go(along(list, by));
  });
  body.parentElement.tabIndex = 0;
  update();
}
