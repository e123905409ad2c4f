// Reading a moment off the picture of memory: what is held under the pointer, by category.

function memory(root, data, tip) {
  const read = data.memory;
  if (!read || read.at.length < 2) return;
  const first = read.at[0], length = read.at[read.at.length - 1] - first;
  root.querySelectorAll(".held svg").forEach(picture => {
    picture.addEventListener("pointermove", event => {
      const box = picture.getBoundingClientRect(), wide = picture.viewBox.baseVal.width;
      const x = ((event.clientX - box.left) / box.width) * wide;
      const ms = first + ((x - read.left) / (wide - read.left - read.right)) * length;
      // What is held stays held until the next point.
      let index = read.at.findIndex(at => at > ms);
      if (ms < first || x > wide) return tip.hide();
      index = (index < 0 ? read.at.length : index) - 1;
      const held = read.held[index], total = held.reduce((sum, size) => sum + size, 0);
      const lines = read.names.map((name, place) => held[place] && `${name} ${shown.memory(held[place])}`);
      tip.show(event, `${shown.memory(total)} at ${shown.time(ms)}`, lines.reverse());
    });
    picture.addEventListener("pointerleave", tip.hide);
  });
}
