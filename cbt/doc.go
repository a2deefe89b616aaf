// Package cbt tracks which blocks of a device changed since which snapshot.
//
// # Words
//
//	tracking block  the unit of a map: a power of two from 4 KiB to 16 MiB
//	number          counts a device's snapshots; a snapshot's frozen map has
//	                the number that was taken with it
//	mark            to note that a tracking block changes after the last
//	                snapshot, that is with its number plus one
//	base            what a map's bytes count from: a byte is the number of a
//	                block's last change less base, 0 says "not since base"
//	generation      a UUID: history is continuous only inside one generation
//	map             the live map of a device; marks go there
//	frozen map      the map as it was when a snapshot was taken
//	view            the live map for a reader, up to the next snapshot
//	memory          where all of a map's bytes live (see Memory)
//	node            a fixed piece of memory: a leaf (map bytes), an index
//	                (links to 512 nodes) or a table (records of roots)
//	link            the number of a node, its level and its epoch, in one word
//	tree            a root and what hangs below it: the live map in one
//	                interval, or a frozen map
//	epoch           whose a node is: a tree writes only into nodes of its own
//	                epoch and copies all others first
//
// # Invariants
//
//  1. When Mark returns, the marked blocks are found in memory by Open, with
//     at least the number that was asked for, whenever the process is killed
//     after that; or the map is lost, and memory says so.
//  2. A node that two trees can reach never changes. So taking a snapshot is
//     sharing a root, whatever the size of the device.
//  3. A node is used again only when no tree, no reader and no marker can
//     still hold a link to it.
//  4. Over-marking is allowed, missing a mark never is: where a question
//     cannot be answered any more, the answer is "changed" or a refusal.
//  5. Numbers grow for ever, also across generations.
//
// # Marking
//
// A marker walks from the root to the leaf, each link one atomic load. If the
// leaf's link carries the tree's epoch, it looks at the byte, and sets it by
// compare-and-swap of its word if it is too small: no lock, and nothing
// written that was set already. Else it copies the path to the leaf under
// nodes.mu, once for each leaf in each epoch. The order is: fill the copy,
// publish the link to it, set the byte.
//
// MarkAt may run while a Freeze begins a new epoch, and then have set a byte in
// a leaf that is shared by now. So it looks afterwards whether the tree that it
// marked is still the live one, and marks again otherwise. If it still is, the
// byte was set before the new epoch began, and every copy that is made in the
// new epoch holds it.
//
// # Using nodes again
//
// Nodes are counted: one for each link in a node, each root, and each list
// below that still mentions them. Counts live in the process and are rebuilt
// by Open. Two kinds of users hold links without being counted:
//
//   - Mark. It runs only while no snapshot is being taken (the caller's gate
//     sees to that), so a node replaced in the live map keeps its count until
//     the next Freeze or Reset.
//   - Readers, and all other markers. They enter a grace period (see grace);
//     what trees give up keeps its count until all have left that could have
//     seen it.
package cbt
