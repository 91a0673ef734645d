// The result over its input, divided by a slider, and both videos in step. Listens on the root: what is in it is replaced.
const find = (name) => element.querySelector(name);
const both = () => [find("video.after"), find("video.before")].filter(Boolean);

function follow() {
  const [after, before] = both();
  if (!after) return;
  find(".time").value = after.duration ? after.currentTime / after.duration : 0;
  find(".play").textContent = after.paused ? "Play" : "Pause";
  if (!before || before.hidden) return;
  const time = after.currentTime + Number(before.dataset.start);
  // Seeks when stopped are exact; while playing, a correction for less would be seen as a jerk.
  if (Math.abs(before.currentTime - time) > (after.paused ? 0.001 : 0.08)) before.currentTime = time;
  if (before.paused !== after.paused) after.paused ? before.pause() : before.play().catch(() => {});
}

for (const name of ["play", "pause", "timeupdate", "seeked", "loadedmetadata"])
  element.addEventListener(name, (event) => event.target.matches(".after") && follow(), true);
element.addEventListener("loadedmetadata", (event) => event.target.matches(".before") && follow(), true);
// The browser does not show this kind of input: the result alone, then.
element.addEventListener("error", (event) => {
  if (!event.target.matches(".before")) return;
  event.target.hidden = true;
  find(".cut").hidden = find(".sides").hidden = true;
}, true);
element.addEventListener("input", (event) => {
  if (event.target.matches(".cut")) find(".stage").style.setProperty("--cut", `${event.target.value}%`);
  const after = find("video.after");
  if (event.target.matches(".time") && after?.duration) after.currentTime = event.target.value * after.duration;
});
element.addEventListener("click", (event) => {
  const after = find("video.after");
  if (after && event.target.matches(".play, .after")) after.paused ? after.play() : after.pause();
});
