package cbt

import (
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
)

// justUnder16TiB is the size of the largest file on ext4.
const justUnder16TiB = 16<<40 - 4096

func newBenchMap(b *testing.B, size int64) *Map {
	b.Helper()
	m, err := New(newMapped(b, 4<<30), size, DefaultBlock, uuid.New(), 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(m.Close)
	return m
}

// offsets returns where a benchmark writes.
func offsets(size int64, k int) []int64 {
	rng := rand.New(rand.NewPCG(1, 2))
	offs := make([]int64, k)
	for i := range offs {
		offs[i] = rng.Int64N(size-4096) &^ 4095
	}
	return offs
}

// BenchmarkMark is the mark of one 4 KiB write at a random offset that was
// written since the last snapshot, by one writer and by as many as there are
// processors, for each of them. On the larger devices it waits for the byte: the
// map does not fit in the processor's cache.
func BenchmarkMark(b *testing.B) {
	for _, d := range []struct {
		name string
		size int64
	}{{"10GiB", 10 << 30}, {"1TiB", 1 << 40}, {"16TiB", justUnder16TiB}} {
		b.Run(d.name, func(b *testing.B) {
			m := newBenchMap(b, d.size)
			offs := offsets(d.size, 1<<20)
			m.Mark(0, d.size)
			b.Run("alone", func(b *testing.B) {
				i := 0
				for b.Loop() {
					m.Mark(offs[i&(len(offs)-1)], 4096)
					i++
				}
			})
			b.Run("together", func(b *testing.B) {
				var start atomic.Int64
				b.RunParallel(func(pb *testing.PB) {
					i := start.Add(1 << 18)
					for pb.Next() {
						m.Mark(offs[i&int64(len(offs)-1)], 4096)
						i++
					}
				})
				each := b.Elapsed() * time.Duration(runtime.GOMAXPROCS(0))
				b.ReportMetric(float64(each.Nanoseconds())/float64(b.N), "ns/mark")
			})
		})
	}
}

// BenchmarkNewMark is the same for a tracking block that was not written since
// the last snapshot, while others of its leaf were.
func BenchmarkNewMark(b *testing.B) {
	const blocks = 10 << 30 / DefaultBlock
	m := newBenchMap(b, blocks*DefaultBlock)
	next := func() {
		freeze(b, m).Release()
		for off := int64(0); off < m.Size(); off += DefaultBlock << leafBits {
			m.Mark(off, 1)
		}
	}
	next()
	for i := int64(0); b.Loop(); i++ {
		if i == blocks {
			b.StopTimer()
			next()
			i = 0
			b.StartTimer()
		}
		m.Mark(i*7919%blocks*DefaultBlock, 4096)
	}
}

// BenchmarkFirstMark is the first mark of a leaf after a snapshot, which
// copies it; memory was prepared.
func BenchmarkFirstMark(b *testing.B) {
	m := newBenchMap(b, 1<<40)
	m.Mark(0, 1<<40)
	const leaf = DefaultBlock << leafBits
	for off := int64(1 << 40); b.Loop(); off += leaf {
		if off >= 1<<40 {
			b.StopTimer()
			freeze(b, m).Release()
			off = 0
			b.StartTimer()
		}
		m.Mark(off, 4096)
	}
}

// markRuns marks a hundredth of the device in 1,000 runs.
func markRuns(m *Map) {
	const runs = 1000
	each := m.Size() / runs
	for i := range int64(runs) {
		m.Mark(i*each, each/100)
	}
}

// BenchmarkFreeze16TiB is a snapshot of a full map in which nothing, 100 leaves, or
// all were marked since the last one. It says how long the slowest took.
func BenchmarkFreeze16TiB(b *testing.B) {
	for _, tc := range []struct {
		name string
		mark func(m *Map, offs []int64)
	}{
		{"none", func(*Map, []int64) {}},
		{"some", func(m *Map, offs []int64) {
			for _, off := range offs {
				m.Mark(off, 4096)
			}
		}},
		{"all", func(m *Map, _ []int64) { m.Mark(0, m.Size()) }},
	} {
		b.Run(tc.name, func(b *testing.B) {
			m := newBenchMap(b, justUnder16TiB)
			m.Mark(0, m.Size())
			offs := offsets(m.Size(), 1<<20)
			var slowest time.Duration
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				tc.mark(m, offs[i*100%(len(offs)-100):][:100])
				if err := m.Prepare(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				start := time.Now()
				f, err := m.Freeze()
				slowest = max(slowest, time.Since(start))
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				f.Release()
				b.StartTimer()
			}
			b.ReportMetric(float64(slowest.Nanoseconds()), "ns/slowest")
		})
	}
}

// BenchmarkSince16TiB is all runs that changed since the last snapshot:
// a hundredth of the device in 1,000 runs on a map in which nothing else ever
// changed, or everything did, or everything changed since, or every second
// block.
func BenchmarkSince16TiB(b *testing.B) {
	for _, tc := range []struct {
		name    string
		prepare func(m *Map)
		runs    int
	}{
		{"runs", markRuns, 1000},
		{"runs-in-a-full-map", func(m *Map) {
			m.Mark(0, m.Size())
			freeze(b, m).Release()
			markRuns(m)
		}, 1000},
		{"all", func(m *Map) { m.Mark(0, m.Size()) }, 1},
		{"every-second-block", func(m *Map) {
			for off := int64(0); off < m.Size(); off += 2 * DefaultBlock {
				m.Mark(off, 1)
			}
		}, (justUnder16TiB + DefaultBlock) / DefaultBlock / 2},
	} {
		b.Run(tc.name, func(b *testing.B) {
			m := newBenchMap(b, justUnder16TiB)
			tc.prepare(m)
			b.Logf("%d MiB", m.mem.Len()>>20)
			v := m.View()
			defer v.Release()
			for b.Loop() {
				got := 0
				runs, _ := v.Since(m.Number())
				for range runs {
					got++
				}
				if got != tc.runs {
					b.Fatalf("got %d runs, want %d", got, tc.runs)
				}
			}
		})
	}
}

// BenchmarkReadMap16TiB reads a full map of 256 MiB as a file is read.
func BenchmarkReadMap16TiB(b *testing.B) {
	m := newBenchMap(b, justUnder16TiB)
	m.Mark(0, m.Size())
	v := m.View()
	defer v.Release()
	p := make([]byte, 1<<20)
	b.SetBytes(v.Blocks())
	for b.Loop() {
		for off := int64(0); off < v.Blocks(); {
			off += int64(v.ReadMap(p, off))
		}
	}
}

// BenchmarkOpen16TiB opens a full map that a killed process left behind.
func BenchmarkOpen16TiB(b *testing.B) {
	m := newBenchMap(b, justUnder16TiB)
	m.Mark(0, m.Size())
	for b.Loop() {
		if _, _, err := Open(m.mem); err != nil {
			b.Fatal(err)
		}
	}
}
