// Tables that sort by a click on a head, commands that copy, and the start of everything.

function sortable(table) {
  table.querySelectorAll("thead th[data-sort]").forEach(head => {
    const column = [...head.parentNode.children].indexOf(head);
    const button = element("button", "sort", head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = head.dataset.sort === "number";
      const descending = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : numeric;
      const value = row => {
        const cell = row.children[column];
        return numeric ? Number(cell.dataset.value || 0) : cell.textContent.trim();
      };
      const order = (a, b) => (numeric ? value(a) - value(b) : value(a).localeCompare(value(b)));
      const body = table.tBodies[0], rows = [...body.rows];
      rows.sort((a, b) => (descending ? order(b, a) : order(a, b)));
      body.append(...rows);
      table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}

// The first rows of a long table, until all are asked for; after sorting, the first ones of the new order.
function folded(table) {
  const count = table.tBodies[0].rows.length;
  if (count <= 25) return;
  table.classList.add("folded");
  const button = element("button", "unfold", `Show all ${count.toLocaleString("en-US")}`);
  table.parentNode.after(button);
  button.addEventListener("click", () => {
    table.classList.remove("folded");
    button.remove();
  });
}

function copied(button) {
  const code = button.parentNode.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no clipboard for this page: the text is marked, ready to be copied
      button.textContent = "Marked";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

document.querySelectorAll(".perfkit.profile:not([data-ready])").forEach(root => {
  root.dataset.ready = "";
  root.querySelectorAll("table.sortable").forEach(sortable);
  root.querySelectorAll("table.sortable").forEach(folded);
  root.querySelectorAll("button.copy").forEach(copied);
  const holder = root.querySelector("script.data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent), tip = tooltip(root);
  timeline(root, data, tip);
  modules(root, data, tip);
  memory(root, data, tip);
});
