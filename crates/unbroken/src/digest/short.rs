//! Digests of many short byte strings at once.
//!
//! Touches: the bytes it is given, read only. A processor hashes eight or sixteen chunks of 1024 bytes in the time of one,
//! and of a string with a dozen chunks it has the second eight half empty, and then the levels of a small tree with less
//! and less to do. Here chunks of one number go together, whichever string they are of, and so do the levels of all trees.
//! What is computed is BLAKE3 (its paper, section 2, which this follows); what computes it is the crate's own code, by a
//! door that is not documented: the crate is pinned, and the tests hold every length against its front door.

use blake3::platform::Platform;
use blake3::{BLOCK_LEN, CHUNK_LEN, IncrementCounter, OUT_LEN};

use super::Digest;

/// Strings below this many bytes are hashed faster together than each alone.
pub(crate) const SHORT: usize = 32 << 10;
/// So many at a time, or a multiple of it, leave nothing empty: wider than that is no processor.
pub(crate) const TOGETHER: usize = 16;
/// Of fewer strings, each is hashed alone: they would fill less of a register together than each by itself.
const WORTH_IT: usize = 4;

const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;

type Node = [u8; OUT_LEN];

/// Returns the digest of each string, in their order.
pub(crate) fn of_short(strings: &[&[u8]]) -> Vec<Digest> {
    if strings.len() < WORTH_IT {
        return strings.iter().map(|string| Digest::of(string)).collect();
    }
    let platform = Platform::detect();
    let mut trees = Vec::with_capacity(strings.len());
    let mut begin = 0;
    for string in strings {
        let nodes = string.len().div_ceil(CHUNK_LEN).max(1);
        trees.push(Tree { begin, nodes });
        begin += nodes;
    }
    let mut nodes = vec![Node::default(); begin];
    hash_chunks(platform, strings, &trees, &mut nodes);
    while trees.iter().any(|tree| tree.nodes > 1) {
        climb(platform, &mut trees, &mut nodes);
    }
    trees.iter().map(|tree| Digest(nodes[tree.begin])).collect()
}

/// The nodes of a string's tree on one level.
struct Tree {
    /// The first one's place among those of all trees.
    begin: usize,
    nodes: usize,
}

/// Fills in the lowest level of all trees.
fn hash_chunks(platform: Platform, strings: &[&[u8]], trees: &[Tree], nodes: &mut [Node]) {
    let most = strings.iter().map(|string| string.len() / CHUNK_LEN).max();
    let (mut chunks, mut places, mut hashed) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..most.unwrap_or(0) {
        chunks.clear();
        places.clear();
        for (string, tree) in strings.iter().zip(trees).filter(|(_, tree)| tree.nodes > 1) {
            let (full, _) = string.as_chunks::<CHUNK_LEN>();
            if let Some(chunk) = full.get(number) {
                chunks.push(chunk);
                places.push(tree.begin + number);
            }
        }
        hashed.resize(chunks.len(), Node::default());
        platform.hash_many(
            &chunks,
            &IV,
            number as u64,
            IncrementCounter::No,
            0,
            CHUNK_START,
            CHUNK_END,
            hashed.as_flattened_mut(),
        );
        scatter(&hashed, &places, nodes);
    }
    for (string, tree) in strings.iter().zip(trees) {
        let last = &string[(tree.nodes - 1) * CHUNK_LEN..];
        let place = &mut nodes[tree.begin + tree.nodes - 1];
        if tree.nodes == 1 {
            *place = blake3::hash(string).into();
        } else if last.len() < CHUNK_LEN {
            *place = hash_end(platform, last, tree.nodes as u64 - 1);
        }
    }
}

/// The node of a string's last chunk, which is not full and not its only one.
fn hash_end(platform: Platform, bytes: &[u8], number: u64) -> Node {
    let mut value = IV;
    let count = bytes.len().div_ceil(BLOCK_LEN);
    for (at, block) in bytes.chunks(BLOCK_LEN).enumerate() {
        let mut padded = [0; BLOCK_LEN];
        padded[..block.len()].copy_from_slice(block);
        let start = if at == 0 { CHUNK_START } else { 0 };
        let end = if at + 1 == count { CHUNK_END } else { 0 };
        platform.compress_in_place(&mut value, &padded, block.len() as u8, number, start | end);
    }
    let mut node = Node::default();
    for (bytes, word) in node.as_chunks_mut::<4>().0.iter_mut().zip(value) {
        *bytes = word.to_le_bytes();
    }
    node
}

/// Takes all trees one level up. A node without a neighbour goes up as it is.
fn climb(platform: Platform, trees: &mut [Tree], nodes: &mut [Node]) {
    for (is_root, flags) in [(false, PARENT), (true, PARENT | ROOT)] {
        let (mut pairs, mut places) = (Vec::new(), Vec::new());
        for tree in trees
            .iter()
            .filter(|tree| tree.nodes > 1 && (tree.nodes == 2) == is_root)
        {
            for at in 0..tree.nodes / 2 {
                let left = tree.begin + 2 * at;
                let pair = nodes[left..left + 2].as_flattened();
                pairs.push(pair.first_chunk::<BLOCK_LEN>().expect("two nodes are a block"));
                places.push(tree.begin + at);
            }
        }
        let mut hashed = vec![Node::default(); pairs.len()];
        platform.hash_many(
            &pairs,
            &IV,
            0,
            IncrementCounter::No,
            flags,
            0,
            0,
            hashed.as_flattened_mut(),
        );
        scatter(&hashed, &places, nodes);
    }
    for tree in trees {
        if tree.nodes > 1 {
            if !tree.nodes.is_multiple_of(2) {
                nodes[tree.begin + tree.nodes / 2] = nodes[tree.begin + tree.nodes - 1];
            }
            tree.nodes = tree.nodes.div_ceil(2);
        }
    }
}

fn scatter(hashed: &[Node], places: &[usize], nodes: &mut [Node]) {
    for (node, &place) in hashed.iter().zip(places) {
        nodes[place] = *node;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 7 / 3) as u8).collect()
    }

    #[test]
    fn every_length_around_each_block_and_chunk_has_the_digest_that_it_has_alone() {
        let near = |edge: usize| edge.saturating_sub(1)..edge + 2;
        let blocks = (0..40).flat_map(|count| near(count * BLOCK_LEN));
        let chunks = (1..34).flat_map(|count| near(count * CHUNK_LEN));
        let strings: Vec<Vec<u8>> = blocks.chain(chunks).map(bytes).collect();
        let strings: Vec<&[u8]> = strings.iter().map(Vec::as_slice).collect();
        for (string, digest) in strings.iter().zip(of_short(&strings)) {
            assert_eq!(digest, Digest::of(string), "{} bytes", string.len());
            assert_eq!(of_short(&[*string; WORTH_IT]), [digest; WORTH_IT]);
        }
        assert_eq!(of_short(&[]), []);
    }

    proptest! {
        #[test]
        fn strings_of_any_lengths_have_together_the_digests_that_each_has_alone(
            lengths in proptest::collection::vec(0..2 * SHORT, 0..40)
        ) {
            let all = bytes(2 * SHORT + 40);
            let strings: Vec<&[u8]> =
                lengths.iter().enumerate().map(|(begin, length)| &all[begin..begin + length]).collect();
            let expected: Vec<Digest> = strings.iter().map(|string| Digest::of(string)).collect();
            prop_assert_eq!(of_short(&strings), expected);
        }
    }
}
