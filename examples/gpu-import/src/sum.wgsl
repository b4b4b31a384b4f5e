// Sums the words of a buffer. Each word is multiplied by an odd number that depends on its index,
// so that the sum depends on the order of the words. Each of the 1024 lanes sums every 1024th word.

@group(0) @binding(0) var<storage, read> words: array<u32>;
@group(0) @binding(1) var<storage, read_write> sums: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var sum = 0u;
    for (var i = id.x; i < arrayLength(&words); i += 1024u) {
        sum += words[i] * (2u * i + 1u);
    }
    sums[id.x] = sum;
}
