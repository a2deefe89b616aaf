// Slots: the addresses that a pool gives out.

package store

import (
	"fmt"
	"math/bits"
)

const (
	// BlockSize is the unit in which space is counted, in bytes.
	BlockSize = 4096

	// SlotSize is the size of a slot in bytes.
	SlotSize = 65536

	// AllBlocks is the mask of a slot that is used whole.
	AllBlocks uint16 = 1<<slotBlocks - 1

	slotBlocks = SlotSize / BlockSize
)

// A Slot is the address of 64 KiB in a pool: the number of a part in bits 40
// to 47 and the slot's index in that part below. Slots whose numbers follow
// each other in one part are neighbours in it. It needs 48 bits.
type Slot uint64

// NoSlot is the zero Slot, which is never given out: parts count from 1.
const NoSlot Slot = 0

const (
	indexBits = 40
	maxSlots  = 1 << 32 // of a part; 256 TiB of addresses
)

func makeSlot(part uint8, index int64) Slot {
	return Slot(part)<<indexBits | Slot(index)
}

// Part is the number of the part that holds the slot.
func (s Slot) Part() uint8 { return uint8(s >> indexBits) }

func (s Slot) index() int64 { return int64(s & (1<<indexBits - 1)) }

// String returns part and index in decimal, as in "1:4711".
func (s Slot) String() string { return fmt.Sprintf("%d:%d", s.Part(), s.index()) }

// blocks is the number of blocks in a mask.
func blocks(mask uint16) int64 { return int64(bits.OnesCount16(mask)) }

// firstBlock is the lowest block in a mask, 16 if there is none.
func firstBlock(mask uint16) int { return bits.TrailingZeros16(mask) }
