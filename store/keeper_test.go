package store

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// eventually waits for what the background is to bring about.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after 20 s still not: %s", what)
		}
	}
}

// spareOf returns how many blocks of the only part are spare.
func spareOf(p *Pool) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ledgers[0].spare
}

// TestIdlePoolGivesBack: a pool that nobody asks for slots keeps nothing that
// is not in use, by itself.
func TestIdlePoolGivesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	p := openPool(t, openFile(t, path, 64<<20))
	var slots []Slot
	for range 10 {
		for _, s := range alloc(t, p, repeat(16, AllBlocks)...) {
			if err := p.WriteAt(s, make([]byte, SlotSize), 0); err != nil {
				t.Fatal(err)
			}
			slots = append(slots, s)
		}
	}
	for _, s := range slots[1:] {
		p.Free(s, AllBlocks)
	}
	p.Shrink(slots[0], 0xff00)
	eventually(t, "nothing is spare", func() bool { return spareOf(p) == 0 })
	if got := backingOf(t, path); got > 48<<10 {
		t.Errorf("bytes on disk with eight blocks in use\n got %d\nwant them and the header", got)
	}
}

// TestMemoryIsReturned looks at what the process has resident.
func TestMemoryIsReturned(t *testing.T) {
	const n = 256 << 20
	p := openPool(t, openMem(t, n+1<<20))
	before := resident(t)
	data := make([]byte, 16*SlotSize)
	var slots []Slot
	for range n / len(data) {
		some := alloc(t, p, repeat(16, AllBlocks)...)
		for _, s := range some {
			if err := p.WriteAt(s, data[:SlotSize], 0); err != nil {
				t.Fatal(err)
			}
		}
		slots = append(slots, some...)
	}
	full := resident(t)
	if full-before < n*9/10 {
		t.Fatalf("resident with %d bytes in use\n got %d more than before\nwant about as many", n, full-before)
	}
	for _, s := range slots {
		p.Free(s, AllBlocks)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	if got := full - resident(t); got < n*9/10 {
		t.Errorf("resident after all was freed\n got %d less\nwant about %d less", got, n)
	}
}

// resident returns how many bytes of memory the process has, mapped how many it
// has addresses for.
func resident(t testing.TB) int64 { return statm(t, 1) }
func mapped(t testing.TB) int64   { return statm(t, 0) }

func statm(t testing.TB, field int) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[field], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// TestSpareIsBounded frees far more than is kept to be used again.
func TestSpareIsBounded(t *testing.T) {
	p := openPool(t, openMem(t, 4<<30))
	const n = 512 << 20 / SlotSize
	var slots []Slot
	for range n / 16 {
		slots = append(slots, alloc(t, p, repeat(16, AllBlocks)...)...)
	}
	stop := keepBusy(p)
	for _, s := range slots {
		p.Free(s, AllBlocks)
	}
	eventually(t, "little is spare", func() bool { return spareOf(p) <= 256<<20/BlockSize })
	if got := spareOf(p); got < 128<<20/BlockSize {
		t.Errorf("spare blocks of a pool that is busy\n got %d\nwant some to be used again", got)
	}
	stop()
}

// TestSinglesAreBounded frees more slots with the same single block than are
// kept to be used again.
func TestSinglesAreBounded(t *testing.T) {
	p := openPool(t, openMem(t, 1<<30))
	var slots []Slot
	for range maxSingles + 100 {
		slots = append(slots, allocOne(t, p, 1<<7))
	}
	stop := keepBusy(p)
	defer stop()
	for _, s := range slots {
		p.Free(s, 1<<7)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if got := len(p.ledgers[0].single[7]); got != maxSingles {
		t.Errorf("slots kept\n got %d\nwant %d", got, maxSingles)
	}
}

// TestFreeWakesTheKeeper: what is too much to be kept is not kept until the
// keeper looks by itself.
func TestFreeWakesTheKeeper(t *testing.T) {
	f := newFaulty(t, 4<<20)
	p := openPool(t, f)
	slots := alloc(t, p, repeat(40, 0x00ff)...)
	hook, entered, release := gate("avail")
	f.set(hook)
	<-entered // here the keeper cannot be woken: whatever wakes it stays
	for _, s := range slots {
		p.Free(s, 0x00ff)
	}
	if got := len(p.ledgers[0].kick); got != 1 {
		t.Errorf("keeper woken\n got %d times\nwant 1", got)
	}
	close(release)
}

// keepBusy keeps a pool from being idle until stop is called.
func keepBusy(p *Pool) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-done:
				return
			case <-time.After(100 * time.Millisecond):
				for _, s := range alloc1(p, 0b101) {
					p.Free(s, 0b101)
				}
			}
		}
	}()
	return func() { close(done); <-ended }
}

// TestSlotsAreUsedAgain: what was freed with its backing goes to those who ask
// for the same blocks.
func TestSlotsAreUsedAgain(t *testing.T) {
	p := openPool(t, openMem(t, 64<<20))
	for _, mask := range []uint16{AllBlocks, 1, 1 << 15} {
		s := allocOne(t, p, mask)
		allocOne(t, p, mask) // so that s is not just the lowest
		p.Free(s, mask)
		if got := allocOne(t, p, mask); got != s {
			t.Errorf("slot for blocks %016b after one was freed\n got %v\nwant %v", mask, got, s)
		}
	}
	s := allocOne(t, p, 1<<3)
	p.Free(s, 1<<3)
	if got := allocOne(t, p, 1<<4); got == s {
		t.Errorf("slot for another block\n got %v again, whose backing is under block 3\nwant another", got)
	}
}

// TestWholeSlotsArePrepared: whoever asks for whole slots soon finds some with
// backing, and no more than a bounded number is made ahead.
func TestWholeSlotsArePrepared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	p := openPool(t, openFile(t, path, 1<<30))
	l := p.ledgers[0]
	alloc(t, p, repeat(16, AllBlocks)...)
	eventually(t, "as many as were asked for are ready", func() bool { return ahead(l, p) >= 16 })
	stop := keepBusy(p)
	p.mu.Lock()
	l.wantAhead(10 * maxAhead)
	p.mu.Unlock()
	p.tend(l, false)
	for range 1000 {
		alloc(t, p, 1) // and nobody else takes them
	}
	if got := ahead(l, p); got != maxAhead {
		t.Errorf("whole slots that are ready\n got %d\nwant %d", got, maxAhead)
	}
	if got, want := backingOf(t, path), int64(maxAhead*SlotSize); got < want {
		t.Errorf("bytes on disk under slots that are ready\n got %d\nwant at least %d", got, want)
	}
	stop()
	eventually(t, "they are given back", func() bool { return ahead(l, p) == 0 && spareOf(p) == 0 })
	_, used, _ := p.Space()
	if got := backingOf(t, path); got > used+64<<10 {
		t.Errorf("bytes on disk when idle\n got %d\nwant at most what is in use, %d", got, used)
	}
}

// ahead is how many warm slots a part has.
func ahead(l *ledger, p *Pool) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return l.warm.n
}

// TestPreparedMemoryIsHuge: huge pages are what makes new memory cheap, where
// the kernel has any.
func TestPreparedMemoryIsHuge(t *testing.T) {
	if text, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled"); err != nil || strings.Contains(string(text), "[never]") {
		missing(t, "transparent huge pages")
	}
	part := openMem(t, 64<<20).(*memPart)
	defer part.Close()
	if err := part.Prepare(0, unitSlots*SlotSize); err != nil {
		t.Fatal(err)
	}
	if got := part.hugeBytes(t); got != hugePage {
		t.Errorf("bytes in huge pages after a unit was prepared\n got %d\nwant %d", got, hugePage)
	}
	if _, err := part.WriteAt([]byte{1}, 10*hugePage); err != nil {
		t.Fatal(err)
	}
	if got := part.hugeBytes(t); got != hugePage {
		t.Errorf("bytes in huge pages after a byte was written elsewhere\n got %d\nwant %d still", got, hugePage)
	}
	for _, flags := range part.field(t, "VmFlags:") {
		if strings.Contains(flags, " hg") || !strings.Contains(flags, " nh") {
			t.Errorf("flags of a piece of the mapping\n got %s\nwant nh, and no hg: only Prepare makes huge pages", flags)
		}
	}
	if err := part.Punch(0, unitSlots*SlotSize); err != nil {
		t.Fatal(err)
	}
	if got := part.hugeBytes(t); got != 0 {
		t.Errorf("bytes in huge pages after Punch\n got %d\nwant 0", got)
	}
}

// hugeBytes adds up the huge pages in the mapping.
func (p *memPart) hugeBytes(t testing.TB) (n int64) {
	t.Helper()
	for _, size := range p.field(t, "AnonHugePages:") {
		kib, err := strconv.ParseInt(strings.TrimSuffix(size, " kB"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		n += kib << 10
	}
	return n
}

// field returns what the kernel says of each piece of the mapping.
func (p *memPart) field(t testing.TB, name string) (values []string) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	start := uint64(uintptr(unsafe.Pointer(&p.mem[0])))
	inside := false
	for line := range strings.Lines(string(text)) {
		if from, to, ok := strings.Cut(strings.Fields(line)[0], "-"); ok {
			at, err1 := strconv.ParseUint(from, 16, 64)
			_, err2 := strconv.ParseUint(to, 16, 64)
			inside = err1 == nil && err2 == nil && at >= start && at < start+uint64(len(p.mem))
		}
		if value, ok := strings.CutPrefix(line, name); ok && inside {
			values = append(values, strings.TrimSpace(value))
		}
	}
	return values
}
