// Block status of exports: which ranges are holes, which have changed.

package control

import (
	"fmt"
	"iter"
	"strings"
	"syscall"

	"blksnap/cow"
	"blksnap/intercept"
)

// The metadata contexts that exports offer. The second is the name that QEMU
// gives to its dirty bitmaps, so that backup tools made for QEMU read our
// increments: there is one for each snapshot's number.
const (
	allocationContext = "base:allocation"
	dirtyContext      = "qemu:dirty-bitmap:since-"
)

// Flags of extents, by the NBD specification, section "Metadata querying", and
// by QEMU's documentation of its own contexts.
const (
	stateHole  = 1 << 0
	stateZero  = 1 << 1
	stateDirty = 1 << 0
)

// mapper is an intercept.Mapper for a live device or an image.
type mapper struct {
	d       *Daemon
	device  string
	changes func() *cow.Changes
	runs    func(off, n int64) iter.Seq2[cow.Run, error]
}

// Contexts names the contexts of existing snapshots. Others are found by name.
func (m mapper) Contexts() []string {
	c := m.changes()
	names := []string{allocationContext}
	for _, n := range m.d.numbers(m.device, c.Base(), c.Number()) {
		names = append(names, dirtyContext+decimal(n))
	}
	return names
}

// HasContext says whether what a context tells is known.
func (m mapper) HasContext(name string) bool {
	if name == allocationContext {
		return true
	}
	num, ok := contextNumber(name)
	if !ok {
		return false
	}
	_, ok = m.changes().Since(num)
	return ok
}

// contextNumber is the NUM of qemu:dirty-bitmap:since-NUM.
func contextNumber(name string) (uint64, bool) {
	num, ok := strings.CutPrefix(name, dirtyContext)
	if !ok {
		return 0, false
	}
	return parseNumber(num)
}

// Status yields the extents of a context.
func (m mapper) Status(name string, off, n int64) iter.Seq2[intercept.Extent, error] {
	if name == allocationContext {
		return m.allocation(off, n)
	}
	num, ok := contextNumber(name)
	if !ok {
		return failed(refuse(syscall.EINVAL, "there is no metadata context %q", clip(name)))
	}
	return m.dirty(num, off, n)
}

func (m mapper) allocation(off, n int64) iter.Seq2[intercept.Extent, error] {
	return func(yield func(intercept.Extent, error) bool) {
		for r, err := range m.runs(off, n) {
			var flags uint32
			if r.Zero {
				flags = stateHole | stateZero
			}
			if !yield(intercept.Extent{N: r.N, Flags: flags}, err) || err != nil {
				return
			}
		}
	}
}

// dirty yields what changed after snapshot num. It reads only the part of the
// map that covers the range: a client asks for a large device bit by bit.
func (m mapper) dirty(num uint64, off, n int64) iter.Seq2[intercept.Extent, error] {
	c := m.changes()
	if _, ok := c.Since(num); !ok {
		return failed(fmt.Errorf("changes since %d are not known any more: %w", num, syscall.EINVAL))
	}
	return func(yield func(intercept.Extent, error) bool) {
		var (
			block = c.BlockSize()
			run   intercept.Extent // being collected
			buf   [4096]byte
		)
		for first := off / block; first*block < off+n; first += int64(len(buf)) {
			got := c.ReadMap(buf[:min(int64(len(buf)), (off+n-1)/block-first+1)], first)
			if got == 0 {
				yield(intercept.Extent{}, fmt.Errorf("read the change map: %w", syscall.EIO))
				return
			}
			for i, b := range buf[:got] {
				from := (first + int64(i)) * block
				e := intercept.Extent{N: min(from+block, off+n) - max(from, off)}
				if uint64(b) > num-c.Base() {
					e.Flags = stateDirty
				}
				if e.Flags == run.Flags || run.N == 0 {
					run = intercept.Extent{N: run.N + e.N, Flags: e.Flags}
					continue
				}
				if !yield(run, nil) {
					return
				}
				run = e
			}
		}
		yield(run, nil)
	}
}

// failed is a sequence that ends with err at once.
func failed(err error) iter.Seq2[intercept.Extent, error] {
	return func(yield func(intercept.Extent, error) bool) { yield(intercept.Extent{}, err) }
}
