// The part in memory.

package store

import (
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memPart is a reservation of addresses. Pages come when they are first
// written and go when they are punched.
type memPart struct {
	traits Traits

	// mu keeps the mapping in place while it is read or written, and is
	// held exclusively to unmap it.
	mu    sync.RWMutex
	mem   []byte // nil once closed
	whole []byte // what was mapped, of which mem is the aligned part
}

// hugePage is what a unit is aligned to in memory, its size on all machines
// that this is for.
const hugePage = 2 << 20

// OpenMem makes a part of limit bytes of memory, a quarter of the machine's if
// limit is 0. No memory is taken before it is used.
func OpenMem(limit int64) (Part, error) {
	var err error
	if limit == 0 {
		limit, err = defaultMemLimit()
	}
	if err == nil {
		err = checkLimit(limit)
	}
	if err != nil {
		return nil, fmt.Errorf("open snapstore in memory: %w", err)
	}
	p := &memPart{}
	slots := sparseSlots(limit)
	for p.reserve(slots) != nil {
		// A kernel that never overcommits, or a limit on address space,
		// leaves room for fewer slots that are used in part.
		if slots /= 2; slots*SlotSize < limit {
			return nil, fmt.Errorf("open snapstore in memory: no room for %s", FormatSize(limit))
		}
	}
	p.traits = Traits{Spec: Spec{Kind: Mem, Limit: limit}, Limit: limit, Slots: slots}
	return p, nil
}

// reserve takes addresses for slots slots.
func (p *memPart) reserve(slots int64) (err error) {
	n := slots * SlotSize
	p.whole, err = unix.Mmap(-1, 0, int(n+hugePage), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	skip := -uintptr(unsafe.Pointer(&p.whole[0])) % hugePage
	p.mem = p.whole[skip:][:n]
	// A huge page under a single block would take 512 times its space.
	_ = unix.Madvise(p.mem, unix.MADV_NOHUGEPAGE)
	// What images were made of is of no use in a core dump.
	_ = unix.Madvise(p.mem, unix.MADV_DONTDUMP)
	return nil
}

func (p *memPart) Traits() Traits { return p.traits }

func (p *memPart) ReadAt(b []byte, off int64) (int, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.mem == nil {
		return 0, errClosed
	}
	return copy(b, p.mem[off:off+int64(len(b))]), nil
}

func (p *memPart) WriteAt(b []byte, off int64) (int, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.mem == nil {
		return 0, errClosed
	}
	return copy(p.mem[off:off+int64(len(b))], b), nil
}

// Prepare has the kernel use huge pages where it has some: they cost a third.
// The mapping takes them only while it is being populated, because a daemon of
// the kernel would later make one of what is left of a unit after a punch.
func (p *memPart) Prepare(off, n int64) error {
	_ = p.advise(off, n, unix.MADV_HUGEPAGE)
	defer p.advise(off, n, unix.MADV_NOHUGEPAGE)
	return p.advise(off, n, unix.MADV_POPULATE_WRITE)
}

func (p *memPart) Punch(off, n int64) error { return p.advise(off, n, unix.MADV_DONTNEED) }

func (p *memPart) advise(off, n int64, advice int) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.mem == nil {
		return errClosed
	}
	return unix.Madvise(p.mem[off:off+n], advice)
}

func (p *memPart) NextData(off int64) (int64, error) { return off, nil }

// Avail is what the machine can give without swapping: a full snapstore costs
// snapshots, memory that is used up the whole process.
func (p *memPart) Avail() (int64, error) { return memInfo("MemAvailable") }

func (p *memPart) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mem == nil {
		return errClosed
	}
	p.mem = nil
	return unix.Munmap(p.whole)
}
