JSON.parse(document.getElementById("specs").textContent).forEach((spec, number) => {
  const place = document.getElementById("picture-" + number);
  vegaEmbed(place, spec, {actions: false, ast: true, renderer: "svg"}).catch((error) => {
    place.textContent = "This picture cannot be drawn: " + error.message;
  });
});
