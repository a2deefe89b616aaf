// Package cow keeps point-in-time images of origins while they are written to.
//
// # Words
//
//	origin    the raw file or block device that is protected; always current
//	device    an origin under tracking: origin, change map, layers
//	block     4 KiB, the smallest unit that is preserved
//	chunk     64 KiB, the unit of mapping and of a snapstore slot
//	preserve  to copy a block's old content to the snapstore before it is
//	          first overwritten
//	layer     what was preserved while one snapshot was the device's newest
//	head      a device's newest layer, the only one that preserving adds to
//	image     one device's content in one snapshot
//	overlay   what was written to a writable image; belongs to that image alone
//	shield    the layers that a writer looks at to see whether a block still
//	          has to be preserved: from the newest healthy image's to the head
//
// # Invariants
//
//  1. Origin first: no fault of a snapshot fails, corrupts, or holds up a read
//     or write of the live device for longer than a set time.
//  2. An acknowledged write is in the origin, an acknowledged flush on stable
//     storage. After one failed flush every later one fails.
//  3. An image reads the bytes that the device held at its instant, or EIO.
//  4. A snapshot of several devices is one instant: if write B was sent after
//     write A was acknowledged, a snapshot that holds B holds A.
//  5. Every block written after snapshot N has a number above N in the live
//     change map.
//  6. Taking a snapshot costs the same whatever the device's size.
//  7. A write copies each block at most once, however many images there are.
//
// # A write
//
// A write enters the device's gate, marks the change map, preserves what is not
// preserved yet, writes the origin, and leaves:
//
//	enter -> mark -> look -> [lock chunk, look again, copy, publish] -> write -> leave
//
// Whoever must not wait does the same in a flight (flight.go), as long as nothing is in
// the way.
//
// The order matters twice. The word that says "preserved" is published before
// the origin is changed, so that a reader that looks at the words after it has
// read the origin knows whether its bytes are old. And an image that could not
// be served is marked broken before the origin is changed, so that a reader that
// asks for the image's health after it has read never returns new bytes as old.
//
// # A read of an image
//
// Blocks are looked up in the image's overlay, if it is writable, in its own layer,
// then in newer ones up to the head, and come from the origin where none has them. Reads take no lock that a
// write waits for. They look up, read, and look up again, until nothing moved in
// between: a block may have been preserved, or folded into an older layer, while
// it was read (see Image.Read).
//
// # A write to an image
//
// It marks the change maps, and goes to the image's overlay and nowhere else:
//
//	mark -> [lock chunk, read around, write slot, publish]
//
// Neither the device nor another image ever sees it, or waits for it.
//
// # The end of a snapshot
//
// Destroying an image, or breaking it, takes its health away at once; a
// goroutine of the device then waits until no writer and no reader can still be
// using what it gives back (see reclaim.go). Nothing waits for it.
package cow
