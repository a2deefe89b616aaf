package store

import (
	"bytes"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkAlloc gives out and frees n neighbours. The parts are of memory: no
// I/O is part of it.
func BenchmarkAlloc(b *testing.B) {
	for _, bc := range []struct {
		name string
		n    int
		mask uint16
	}{
		{"one block", 1, 1 << 5},
		{"three blocks", 1, 7 << 5},
		{"one chunk", 1, AllBlocks},
		{"16 chunks", 16, AllBlocks},
	} {
		b.Run(bc.name, func(b *testing.B) {
			p := openPool(b, openMem(b, 1<<30))
			dst, masks := make([]Slot, bc.n), make([]uint16, bc.n)
			for i := range masks {
				masks[i] = bc.mask
			}
			b.ReportAllocs()
			for b.Loop() {
				n, err := p.Alloc(dst, masks)
				if err != nil {
					b.Fatal(err)
				}
				for _, s := range dst[:n] {
					p.Free(s, bc.mask)
				}
			}
		})
	}
}

// BenchmarkAllocNew gives out slots that were never used.
func BenchmarkAllocNew(b *testing.B) {
	p := openPool(b, openMem(b, 1<<40))
	dst, masks := make([]Slot, 1), []uint16{1}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Alloc(dst, masks); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkExtend(b *testing.B) {
	p := openPool(b, openMem(b, 1<<30))
	s := allocOne(b, p, 1)
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Extend(s, 2); err != nil {
			b.Fatal(err)
		}
		p.Shrink(s, 2)
	}
}

// BenchmarkCopy writes what preserving one write writes, into slots that were
// never used and into slots that were. cpu-ns/op is what the whole process
// takes for it, keepers included: on a busy machine it is steadier than time.
func BenchmarkCopy(b *testing.B) {
	for _, kind := range []Kind{Mem, File} {
		for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
			for _, reused := range []bool{false, true} {
				name := fmt.Sprintf("%s/%s/new", kind, FormatSize(int64(size)))
				if reused {
					name = fmt.Sprintf("%s/%s/reused", kind, FormatSize(int64(size)))
				}
				b.Run(name, func(b *testing.B) { benchmarkCopy(b, kind, size, reused) })
			}
		}
	}
}

func benchmarkCopy(b *testing.B, kind Kind, size int, reused bool) {
	part := openMem(b, 2<<30)
	if kind == File {
		part = openFile(b, filepath.Join(b.TempDir(), "store"), 2<<30)
	}
	p := openPool(b, part)
	data := make([]byte, size)
	dst, masks := make([]Slot, max(1, size/SlotSize)), make([]uint16, max(1, size/SlotSize))
	for i := range masks {
		masks[i] = AllBlocks
	}
	if size < SlotSize {
		masks[0] = 1<<(size/BlockSize) - 1
	}
	var used []Slot
	free := func() {
		for _, s := range used {
			p.Free(s, masks[0])
		}
		used = used[:0]
	}
	b.SetBytes(int64(size))
	cpu := -cpuTime(b)
	for b.Loop() {
		n, err := p.Alloc(dst, masks)
		if err != nil {
			b.Fatal(err)
		}
		for at := 0; at < n; {
			run := 1
			for at+run < n && dst[at+run] == dst[at]+Slot(run) {
				run++
			}
			if err := p.WriteAt(dst[at], data[:min(size, run*SlotSize)], 0); err != nil {
				b.Fatal(err)
			}
			at += run
		}
		used = append(used, dst[:n]...)
		if reused {
			free()
		} else if _, _, left := p.Space(); left < 2<<30-256<<20 {
			b.StopTimer()
			cpu += cpuTime(b)
			free()
			if err := p.Discard(); err != nil {
				b.Fatal(err)
			}
			cpu -= cpuTime(b)
			b.StartTimer()
		}
	}
	b.ReportMetric(float64(cpu+cpuTime(b))/float64(b.N), "cpu-ns/op")
}

// cpuTime is how long the process has used a processor.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRead reads preserved blocks, as an image does.
func BenchmarkRead(b *testing.B) {
	for _, kind := range []Kind{Mem, File} {
		for _, size := range []int{4 << 10, 64 << 10} {
			b.Run(fmt.Sprintf("%s/%s", kind, FormatSize(int64(size))), func(b *testing.B) {
				part := openMem(b, 2<<30)
				if kind == File {
					part = openFile(b, filepath.Join(b.TempDir(), "store"), 2<<30)
				}
				p := openPool(b, part)
				s, data := allocOne(b, p, AllBlocks), bytes.Repeat([]byte{0xa5}, SlotSize)
				if err := p.WriteAt(s, data, 0); err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if err := p.ReadAt(s, data[:size], 0); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkAdopt opens a store again in which 100,000 chunks with a block each
// were preserved, and gives the rest back.
func BenchmarkAdopt(b *testing.B) {
	const n = 100_000
	path := filepath.Join(b.TempDir(), "store")
	p := NewPool(openFile(b, path, 2<<30))
	data := make([]byte, BlockSize)
	var slots []Slot
	for i := range n {
		s := allocOne(b, p, 1<<(i%16))
		if err := p.WriteAt(s, data, int64(i%16)*BlockSize); err != nil {
			b.Fatal(err)
		}
		slots = append(slots, s)
	}
	if err := p.Close(); err != nil {
		b.Fatal(err)
	}
	var discard time.Duration
	for b.Loop() {
		p := NewPool(openFile(b, path, 0))
		for i, s := range slots {
			if err := p.Adopt(s, 1<<(i%16)); err != nil {
				b.Fatal(err)
			}
		}
		start := time.Now()
		if err := p.Discard(); err != nil {
			b.Fatal(err)
		}
		discard += time.Since(start)
		if err := p.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(discard.Milliseconds())/float64(b.N), "ms-Discard/op")
}
