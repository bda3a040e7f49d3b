// Puts the pack's style sheet into the page, once.
const ID = "lowbit-style";

export function addStyle() {
  if (document.getElementById(ID)) return;
  const link = document.createElement("link");
  link.id = ID;
  link.rel = "stylesheet";
  link.href = new URL("./lowbit.css", import.meta.url).href;
  document.head.append(link);
}
