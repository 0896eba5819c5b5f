"""GLSL: the model with its materials, its shadow on the floor, and the background behind it."""

_NOISE = """
uint hash(uvec3 v) {  // integers alone: the same on every device
  v = v * 1664525u + 1013904223u;
  v.x += v.y * v.z; v.y += v.z * v.x; v.z += v.x * v.y;
  v ^= v >> 16u;
  v.x += v.y * v.z; v.y += v.z * v.x; v.z += v.x * v.y;
  return v.x ^ v.z;
}
float random(ivec2 cell, uint seed) { return float(hash(uvec3(cell, seed)) >> 8) / 16777216.0; }
float noise(vec2 p, uint seed) {
  ivec2 i = ivec2(floor(p));
  vec2 f = p - floor(p);
  f = f * f * (3.0 - 2.0 * f);
  return mix(mix(random(i, seed), random(i + ivec2(1, 0), seed), f.x),
             mix(random(i + ivec2(0, 1), seed), random(i + ivec2(1, 1), seed), f.x), f.y);
}
"""

MODEL_VERTEX = """
#version 410
uniform mat4 clip;
in vec3 place; in vec3 normal; in vec2 uv;
out vec3 world; out vec3 n; out vec2 t;
void main() { world = place; n = normal; t = uv; gl_Position = clip * vec4(place, 1.0); }
"""

# Light in linear colours, written as sRGB: samples are averaged as they are stored, so that
# picture = mask * subject + (1 - mask) * background holds for the stored numbers.
MODEL_FRAGMENT = """
#version 410
uniform vec4 color; uniform bool textured; uniform sampler2D texture0;
uniform vec3 eye; uniform vec3 light; uniform vec3 sun; uniform float ambient;
uniform vec3 floor_color;
in vec3 world; in vec3 n; in vec2 t;
out vec4 result;
void main() {
  vec4 c = color;
  if (textured) c *= texture(texture0, t);
  // Transparent: fewer of the four samples, others in neighbouring pixels.
  int count = int(c.a * 4.0 + 0.5);
  if (count == 0) discard;
  int first = (int(gl_FragCoord.x) + 2 * int(gl_FragCoord.y)) & 3;
  int bits = ((1 << count) - 1) << first;
  gl_SampleMask[0] = (bits | (bits >> 4)) & 15;
  vec3 albedo = pow(c.rgb, vec3(2.2));
  vec3 to_eye = normalize(eye - world);
  // Many models are one-sided or wound either way: what is seen faces the eye.
  vec3 face = cross(dFdx(world), dFdy(world));
  if (dot(face, to_eye) < 0.0) face = -face;
  vec3 normal = dot(n, n) > 1e-6 ? normalize(n) : normalize(face);
  if (dot(face, normal) < 0.0) normal = -normal;
  float up = normal.y * 0.5 + 0.5;
  vec3 around = ambient * mix(0.55 * floor_color + 0.15, vec3(1.0), up);
  float straight = max(dot(normal, light), 0.0);
  vec3 fill = vec3(0.12 * ambient * max(dot(normal, to_eye), 0.0));
  vec3 lit = albedo * (around + fill + 0.75 * sun * straight);
  float shine = pow(max(dot(normal, normalize(light + to_eye)), 0.0), 40.0);
  // Also black things mirror a little of what is around them, most at their edges.
  float rim = pow(1.0 - max(dot(normal, to_eye), 0.0), 3.0);
  lit += 0.08 * sun * shine * step(0.001, straight) + (0.012 + 0.05 * rim) * around;
  result = vec4(pow(clamp(lit, 0.0, 1.0), vec3(1.0 / 2.2)), 1.0);
}
"""

SHADOW_VERTEX = """
#version 410
uniform vec3 light; uniform float reach;
in vec3 place;
void main() {
  vec2 p = place.xz - light.xz / light.y * place.y;
  gl_Position = vec4(p / reach, 0.0, 1.0);
}
"""
SHADOW_FRAGMENT = """
#version 410
out vec4 result;
void main() { result = vec4(1.0); }
"""

SCREEN_VERTEX = """
#version 410
in vec2 corner;
void main() { gl_Position = vec4(corner, 0.0, 1.0); }
"""

# Ground and back: indices into scene.GROUNDS and scene.BACKS.
BACKGROUND_FRAGMENT = """
#version 410
uniform sampler2DMS model; uniform sampler2D shadow;
uniform mat3 rays; uniform vec3 eye; uniform float size; uniform float focal; uniform float reach;
uniform int ground; uniform int back; uniform uint seed; uniform float turn; uniform float azimuth;
uniform vec3 ground_color; uniform vec3 back_color; uniform bool flat_white;
out vec4 result;
""" + _NOISE + """
// How much of a pattern of this frequency is left when a pixel is `width` wide there.
float seen(float frequency, float width) { return 1.0 - smoothstep(0.25, 0.8, frequency * width); }
float mottled(vec2 p, float width) {
  float sum = 0.0, strength = 0.5, f = 1.5;
  for (int k = 0; k < 4; k++, f *= 2.3, strength *= 0.62)
    sum += strength * seen(f, width) * (noise(p * f, seed + uint(k)) - 0.5);
  return sum;
}
float line(float x, float thick, float width) {  // 1 on lines at whole numbers
  float d = abs(x - floor(x + 0.5));
  return (1.0 - smoothstep(thick, thick + width + 0.01, d)) * seen(1.0, width * 0.6);
}
vec3 ground_at(vec2 p, float w) {
  vec3 c = ground_color;
  float m = mottled(p, w);
  if (ground == 1) {  // planks
    float row = p.y * 2.2;
    int n = int(floor(row));
    float along = p.x * 0.45 + 3.7 * random(ivec2(n, 7), seed);
    float tone = random(ivec2(n, int(floor(along))), seed + 9u) - 0.5;
    float grain = noise(vec2(p.x * 2.0, p.y * 34.0), seed) - 0.5;
    c *= 1.0 + seen(1.0, w) * 0.34 * tone + 0.22 * grain * seen(12.0, w) + 0.2 * m;
    c *= 1.0 - 0.5 * max(line(row, 0.02, 2.2 * w), line(along, 0.006, 0.45 * w));
  } else if (ground == 2 || ground == 8) {  // grass, with flowers
    float blades = noise(p * vec2(26.0, 14.0), seed + 5u) - 0.5;
    c *= 1.0 + 1.0 * m + 0.8 * blades * seen(14.0, w);
    if (ground == 8) {
      ivec2 cell = ivec2(floor(p * 5.0));
      vec2 at = vec2(random(cell, seed + 1u), random(cell, seed + 2u));
      vec2 d = p * 5.0 - vec2(cell) - 0.25 - 0.5 * at;
      float pick = random(cell, seed + 3u);
      vec3 petal = pick < 0.3 ? vec3(0.95, 0.9, 0.95) : pick < 0.55 ? vec3(0.95, 0.8, 0.15)
                 : pick < 0.8 ? vec3(0.85, 0.2, 0.25) : vec3(0.55, 0.35, 0.8);
      c = mix(c, petal, (1.0 - smoothstep(0.16, 0.22 + 5.0 * w, length(d)))
                        * step(random(cell, seed + 4u), 0.6) * seen(2.0, w));
    }
  } else if (ground == 3) c *= 1.0 + 0.35 * m + 0.05 * sin(p.y * 9.0 + 6.0 * m) * seen(3.0, w);
  else if (ground == 4) c *= 1.0 + 0.16 * m;
  else if (ground == 5) c *= 1.0 + 0.5 * m + 0.3 * (noise(p * 40.0, seed) - 0.5) * seen(26.0, w);
  else if (ground == 6) {
    vec2 q = p * 1.6;
    c *= 1.0 + 0.10 * (random(ivec2(floor(q)), seed) - 0.5) + 0.1 * m;
    c *= 1.0 - 0.35 * max(line(q.x, 0.02, 1.6 * w), line(q.y, 0.02, 1.6 * w));
  } else if (ground == 7) {
    c *= 1.0 + 0.4 * m + 0.2 * (noise(p * 30.0, seed) - 0.5) * seen(22.0, w);
  } else c *= 1.0 + 0.05 * m;
  return c;
}
vec3 wall_at(vec2 p, float w) {
  vec3 c = back_color;
  if (back == 3) {
    float row = p.y * 4.0;
    float along = p.x * 1.9 + 0.5 * mod(floor(row), 2.0);
    float tone = random(ivec2(int(floor(along)), int(floor(row))), seed + 11u) - 0.5;
    c *= 1.0 + 0.4 * tone * seen(3.0, w) + 0.3 * mottled(p, w);
    float mortar = max(line(row, 0.05, 4.0 * w), line(along, 0.025, 1.9 * w));
    return mix(c, vec3(0.76, 0.73, 0.69), mortar);
  }
  c *= 1.0 + 0.1 * mottled(p, w);
  return p.y < 0.22 ? mix(vec3(0.93), c, 0.15) * (1.0 - 0.25 * smoothstep(0.20, 0.22, p.y)) : c;
}
vec3 far_at(vec3 dir) {  // sky; a sea below it
  float h = dir.y;
  vec3 sky = mix(mix(back_color, vec3(0.97), 0.55), back_color * 0.82, smoothstep(0.0, 0.55, h));
  vec2 p = dir.xz / (abs(h) + 0.12);
  float cloud = 0.6 * noise(p * 1.3, seed + 21u) + 0.4 * noise(p * 3.1, seed + 22u);
  return mix(sky, vec3(0.98), 0.6 * smoothstep(0.52, 0.75, cloud) * smoothstep(0.02, 0.2, h));
}
vec3 background(vec3 dir) {
  if (back == 0) {  // one cloth for floor and wall
    float t = dir.y < -1e-4 ? -eye.y / dir.y : 1e4;
    vec3 hit = eye + t * dir;
    float fade = smoothstep(2.0, 9.0, length(hit.xz));
    return mix(ground_at(hit.xz, 0.01), back_color, fade) * (0.90 + 0.12 * fade);
  }
  float a = azimuth + turn;
  vec2 away = vec2(-sin(a), -cos(a));  // where the wall stands
  vec2 side = vec2(away.y, -away.x);
  float t_floor = dir.y < -1e-4 ? -eye.y / dir.y : 1e9;
  float depth = back == 2 || back == 3 ? 2.6 : 1e9;
  float speed = dot(dir.xz, away);
  float t_wall = speed > 1e-4 ? (depth - dot(eye.xz, away)) / speed : 1e9;
  if (depth < 1e8 && t_wall < t_floor) {
    vec3 hit = eye + t_wall * dir;
    return wall_at(vec2(dot(hit.xz, side), hit.y), t_wall / focal);
  }
  if (t_floor > 1e8) return far_at(dir);
  vec3 hit = eye + t_floor * dir;
  vec2 p = vec2(dot(hit.xz, side), dot(hit.xz, away));
  float w = t_floor / focal / max(-dir.y, 0.08) * 0.7;
  vec3 c = ground_at(p, w);
  if (back == 4 && p.y > 5.5)
    c = mix(vec3(0.16, 0.46, 0.62), vec3(0.9, 0.95, 0.97),
            max(1.0 - smoothstep(0.0, 0.5, p.y - 5.5), 0.25 * noise(p * vec2(0.6, 3.0), seed)));
  if (back == 1 || back == 4)
    c = mix(c, mix(back_color, vec3(0.97), 0.55), 0.75 * smoothstep(8.0, 60.0, t_floor));
  return c;
}
void main() {
  ivec2 pixel = ivec2(gl_FragCoord.xy);
  vec4 subject = vec4(0.0);
  for (int k = 0; k < 4; k++) subject += 0.25 * texelFetch(model, pixel, k);
  vec3 c = vec3(1.0);
  if (!flat_white) {
    vec3 dir = normalize(rays * vec3(gl_FragCoord.x, size - gl_FragCoord.y, 1.0));
    c = background(dir);
    if (dir.y < -1e-4) {
      vec3 hit = eye - eye.y / dir.y * dir;
      vec2 s = hit.xz / reach * 0.5 + 0.5;
      float dark = 0.65 * textureLod(shadow, s, 1.5).r + 0.35 * textureLod(shadow, s, 3.0).r;
      if (max(abs(s.x - 0.5), abs(s.y - 0.5)) < 0.5) c *= 1.0 - 0.45 * dark;
    }
  }
  c = floor(clamp(c, 0.0, 1.0) * 255.0 + 0.5) / 255.0;
  result = vec4(subject.rgb + (1.0 - subject.a) * c, subject.a);
}
"""
