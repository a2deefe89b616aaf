// Package store is the snapstore: a pool of slots over parts (memory, files,
// block devices) in which preserved blocks live.
//
// # Words
//
//	block      4 KiB: the unit in which space is counted
//	slot       64 KiB of a part, room for the 16 blocks of one chunk
//	mask       16 bits, bit k for block k of a slot
//	part       one piece of the store, with a limit of its own
//	in use     given to a caller; its blocks in use are those of its mask
//	backing    memory or disk space that is really there under a block
//	spare      blocks that are not in use but may still have backing
//	clean      a free slot without backing
//	warm       a free slot all of whose blocks are spare
//	dirty      a slot, free or in use, whose spare is to be given back
//
// # The life of a slot
//
//	         Alloc                 Free
//	clean ----------> in use ----------------> warm, single or dirty
//	  ^                 ^                        |            |
//	  |                 |         Alloc          |            |
//	  |                 +------------------------+            |
//	  |                      punched                          |
//	  +-------------------------------------------------------+
//
// Writing to a slot that was used before costs half of writing to a new one,
// so freed slots wait for a while with their backing, bounded, where another
// request for the same blocks finds them: whole ones in one set, those with a
// single block in sixteen others. A goroutine for each part, its keeper, gives
// the rest back, and makes whole slots warm where whole slots are asked for.
//
// # Invariants
//
//  1. A slot is given out only while it is neither in use nor quarantined nor
//     being punched.
//  2. No more blocks of a part are given out than its limit allows.
//  3. A block in use is never punched.
//  4. No lock that Alloc, Extend or Free takes is held across I/O. Only where
//     nothing but slots that are being punched is left does Alloc wait.
//  5. A fault of one part leaves the others as they are.
//
// The package knows nothing of origins, layers or snapshots.
package store
