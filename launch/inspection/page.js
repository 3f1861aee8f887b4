const chosen = document.getElementById("source");
if (chosen) chosen.addEventListener("change", () => {
  for (const article of document.querySelectorAll("article[data-source]"))
    article.hidden = chosen.value !== "" && article.dataset.source !== chosen.value;
});
