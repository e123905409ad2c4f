// The map of modules: a flame (the model on top, its parts below) or a treemap (areas), by time, arithmetic or memory.

function modules(root, data, tip) {
  const holder = root.querySelector(".map");
  const tree = data.tree;
  if (!holder || tree.name.length < 2) return;
  const ROW = 26, TALL = 400, HEAD = 20;
  const field = holder.querySelector(".field"), trail = holder.querySelector(".trail");
  const children = tree.name.map(() => []);
  tree.parent.forEach((parent, index) => { if (parent >= 0) children[parent].push(index); });
  const state = { shape: "flame", by: "time", at: 0 };
  const size = index => tree[state.by][index];
  const parts = index => children[index].filter(child => size(child) > 0).sort((a, b) => size(b) - size(a));

  function draw() {
    field.replaceChildren();
    breadcrumbs();
    if (!size(state.at)) {
      field.style.height = "";
      field.append(element("p", "about", { time: "No time", flops: "No arithmetic", memory: "No activations" }[state.by] + " known by module."));
    } else if (state.shape === "flame") {
      field.style.height = `${flame(state.at, 0, field.clientWidth, 0) * ROW}px`;
    } else {
      field.style.height = `${TALL}px`;
      treemap(state.at, { x: 0, y: 0, wide: field.clientWidth, tall: TALL }, 0);
    }
  }

  // Draws a node and what is below it; how many rows that took.
  function flame(index, left, wide, row) {
    place(index, { x: left, y: row * ROW, wide, tall: ROW });
    let deepest = row + 1, at = left;
    const { shown: large, rest } = split(index, child => (wide * size(child)) / size(index) >= 1.5 && row < 40);
    for (const child of large) {
      const part = (wide * size(child)) / size(index);
      deepest = Math.max(deepest, flame(child, at, part, row + 1));
      at += part;
    }
    if (rest.length && left + wide - at > 2 && row < 40) {
      remainder(index, rest, { x: at, y: (row + 1) * ROW, wide: (wide * total(rest)) / size(index), tall: ROW });
      deepest = Math.max(deepest, row + 2);
    }
    return deepest;
  }

  const total = items => items.reduce((sum, item) => sum + size(item), 0);

  // The parts that can be seen, and those that are too small one by one.
  function split(index, seen) {
    const inner = parts(index);
    return { shown: inner.filter(seen), rest: inner.filter(child => !seen(child)) };
  }

  function remainder(index, rest, box) {
    const cell = cellAt(box, "node rest");
    const told = `${rest.length.toLocaleString("en-US")} more in ${tree.name[index]}`;
    if (box.wide > 60 && box.tall > 12) cell.append(element("span", "", told));
    cell.addEventListener("pointermove", event => tip.show(event, told, [
      `${shown[state.by](total(rest))}, ${shown.share(total(rest) / size(0))} of all, each too small to be drawn`]));
    cell.addEventListener("pointerleave", tip.hide);
    field.append(cell);
  }

  function cellAt(box, kind, tag = "div") {
    const cell = element(tag, kind);
    Object.assign(cell.style, {
      left: `${box.x}px`, top: `${box.y}px`, width: `${Math.max(box.wide - 1, 1)}px`, height: `${Math.max(box.tall - 1, 1)}px`,
    });
    return cell;
  }

  function treemap(index, box, depth) {
    const inner = parts(index);
    place(index, box, inner.length > 0);
    const room = { x: box.x + 3, y: box.y + HEAD, wide: box.wide - 6, tall: box.tall - HEAD - 3 };
    if (!inner.length || room.wide < 24 || room.tall < 14 || depth > 12) return;
    // What would be smaller than 3 by 3 pixels is one tile together.
    const smallest = (9 * size(index)) / (room.wide * room.tall);
    const { shown: large, rest } = split(index, child => size(child) >= smallest);
    squarified(rest.length ? [...large, rest] : large, room).forEach(([child, part]) => {
      if (child === rest) remainder(index, rest, part);
      else treemap(child, part, depth + 1);
    });
  }

  // Rows of rectangles as square as can be (Bruls, Huizing, van Wijk, 2000).
  function squarified(items, room) {
    const weight = item => (Array.isArray(item) ? total(item) : size(item));
    const scale = (room.wide * room.tall) / items.reduce((sum, item) => sum + weight(item), 0), placed = [];
    let rest = { ...room }, row = [];
    const area = list => list.reduce((sum, item) => sum + weight(item) * scale, 0);
    const worst = list => {
      const side = Math.min(rest.wide, rest.tall), sum = area(list), sizes = list.map(item => weight(item) * scale);
      return Math.max((side ** 2 * Math.max(...sizes)) / sum ** 2, sum ** 2 / (side ** 2 * Math.min(...sizes)));
    };
    const close = () => {
      const flat = rest.wide < rest.tall, side = Math.min(rest.wide, rest.tall), deep = area(row) / side;
      let at = flat ? rest.x : rest.y;
      for (const item of row) {
        const length = (weight(item) * scale) / deep;
        placed.push([item, flat
          ? { x: at, y: rest.y, wide: length - 1, tall: deep - 1 }
          : { x: rest.x, y: at, wide: deep - 1, tall: length - 1 }]);
        at += length;
      }
      if (flat) rest = { x: rest.x, y: rest.y + deep, wide: rest.wide, tall: rest.tall - deep };
      else rest = { x: rest.x + deep, y: rest.y, wide: rest.wide - deep, tall: rest.tall };
      row = [];
    };
    for (const item of items) {
      if (row.length && worst([...row, item]) > worst(row)) close();
      row.push(item);
    }
    if (row.length) close();
    return placed;
  }

  function place(index, box, group) {
    const inner = parts(index).length > 0;
    const cell = cellAt(box, `node c${tree.colour[index]}`, inner ? "button" : "div");
    if (inner) cell.type = "button";
    const role = tree.role[index];
    if (role === "op" || role === "memory") cell.classList.add("leaf");
    if (role === "outside") cell.classList.add("rest");
    if (group) cell.classList.add("group");
    if (box.wide > 26 && box.tall > 12) {
      cell.append(element("span", "", tree.name[index]));
      if (box.wide > 130) cell.append(element("i", "", shown.share(size(index) / size(0))));
    }
    cell.setAttribute("aria-label", `${tree.name[index]}: ${shown[state.by](size(index))}`);
    const tell = event => tip.show(event, tree.name[index], [
      (role === "op" || role === "memory") && path(index) ? `in ${path(index)}` : tree.kind[index],
      `${shown[state.by](size(index))}, ${shown.share(size(index) / size(0))} of all`,
      inner && index !== state.at ? "click to enlarge" : "",
    ]);
    cell.addEventListener("pointermove", tell);
    cell.addEventListener("pointerleave", tip.hide);
    if (inner) {
      cell.addEventListener("click", () => {
        tip.hide();
        enter(index === state.at ? Math.max(tree.parent[index], 0) : index);
      });
    }
    field.append(cell);
  }

  function path(index) {
    const names = [];
    for (let node = tree.parent[index]; node > 0; node = tree.parent[node]) names.unshift(tree.name[node]);
    return names.join(".");
  }

  function enter(index) {
    state.at = index;
    draw();
  }

  function breadcrumbs() {
    const above = [];
    for (let node = state.at; node >= 0; node = tree.parent[node]) above.unshift(node);
    trail.replaceChildren(...(above.length < 2 ? [] : above).map((node, place) => {
      const step = element(place < above.length - 1 ? "button" : "span", "", tree.name[node]);
      if (place < above.length - 1) step.addEventListener("click", () => enter(node));
      return step;
    }));
  }

  holder.querySelectorAll(".choice").forEach(choice => choice.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    state[choice.dataset.sets] = button.dataset.value;
    choice.querySelectorAll("button").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
    draw();
  }));
  redrawn(holder, draw);
}
