// Two handles on one rail. `props.value` is {first, last, count, rate, moved}: frames from 0, the last one included.
const first = element.querySelector(".first"), last = element.querySelector(".last");
const chosen = element.querySelector(".chosen"), output = element.querySelector("output");

function show() {
  const a = Number(first.value), b = Number(last.value), end = Math.max(1, Number(first.max));
  chosen.style.left = `${(100 * a) / end}%`;
  chosen.style.right = `${100 - (100 * b) / end}%`;
  // Where both are at the end, the one that can still move lies on top.
  first.style.zIndex = a > end / 2 ? 2 : 1;
  last.style.zIndex = a > end / 2 ? 1 : 2;
  const count = b - a + 1, rate = props.value?.rate ?? 25;
  const frames = count === 1 ? `frame ${a}` : `frames ${a} to ${b}`;
  output.textContent = `${frames}: ${count} of ${end + 1}, ${(count / rate).toFixed(1)} s`;
}

function take() {
  const value = props.value;
  if (!value) return;
  for (const handle of [first, last]) handle.max = value.count - 1;
  first.value = value.first;
  last.value = value.last;
  show();
}

function moved(handle, done) {
  if (handle === first) first.value = Math.min(Number(first.value), Number(last.value));
  else last.value = Math.max(Number(first.value), Number(last.value));
  show();
  if (!done) return;
  props.value = { ...props.value, first: Number(first.value), last: Number(last.value), moved: Number(handle.value) };
  trigger("change");
}

for (const handle of [first, last]) {
  handle.addEventListener("input", () => moved(handle, false));
  handle.addEventListener("change", () => moved(handle, true));
}
watch("value", take);
take();
