// Package fusefs shows devices, snapshots and images as a tree of plain files.
//
// The tree is a view: it holds nothing that its Source does not hold, asks the
// Source at every lookup, and can be unmounted and mounted again at any time.
// docs/design.md has the table of its files.
//
// # Words
//
//	node    a file or directory of the tree, from the kernel's first lookup
//	        until the kernel forgets it
//	live    said of a file whose content can change while its name stays: all
//	        below /devices, every state, all maps and lists of changes, and
//	        all qcow2 files (a write to the image of an older snapshot marks
//	        them); the others are frozen
//	keep    how long the kernel may use a name or attributes without asking
//
// # Invariants
//
//  1. What an open file reads does not change while it is open, and is exactly
//     as long as a stat of that open file says. (A writable image changes only
//     by writes to that image.)
//  2. A node shows one device, snapshot or image for its whole life, and inode
//     numbers are never used again: what the kernel holds of a destroyed
//     snapshot never shows in a later one of the same name.
//  3. A name that can begin or cease to lead to a node is never kept: names
//     and negative answers of devices, snapshots and live files are asked for
//     again each time. So no notification is needed for correctness; those
//     that are sent only let the kernel drop what is gone.
//  4. A lookup or a listing computes nothing that grows with the device. Sizes
//     that need work are computed at stat, contents at open.
//  5. Notifications are sent by a goroutine of their own, which holds no lock:
//     the kernel answers them only when it has the directory's lock, which it
//     holds while it waits for our mkdir.
package fusefs
