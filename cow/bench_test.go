package cow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"blksnap/store"
)

// benchSize is how large an origin is of which all blocks are written.
const benchSize = 256 << 20

// benchStores are the kinds of snapstores.
var benchStores = []string{"mem", "file"}

// benchDevice opens a device over a file in the page cache, all of it data if full
// is set, with a snapstore in memory or in a file.
func benchDevice(b *testing.B, kind string, size int64, full bool) *Device {
	b.Helper()
	dir := b.TempDir()
	path := filepath.Join(dir, "vda")
	err := os.WriteFile(path, nil, 0o600)
	if err == nil {
		err = os.Truncate(path, size)
	}
	if err != nil {
		b.Fatal(err)
	}
	var part store.Part
	if kind == "mem" {
		part, err = store.OpenMem(2 * benchSize)
	} else {
		part, err = store.OpenFile(filepath.Join(dir, "store"), 2*benchSize, false)
	}
	if err != nil {
		b.Fatal(err)
	}
	pool := store.NewPool(part)
	c, why, err := OpenCatalogue("", "")
	if err = errors.Join(why, err); err != nil {
		b.Fatal(err)
	}
	o, err := OpenOrigin(path)
	if err != nil {
		b.Fatal(err)
	}
	d, err := c.Open(o, pool, Config{Name: "vda"})
	if err != nil {
		b.Fatal(err)
	}
	if full {
		p := make([]byte, 1<<20)
		for off := int64(0); off < size; off += int64(len(p)) {
			benchWrite(b, d, p, off)
		}
	}
	b.Cleanup(func() {
		if err := errors.Join(d.Close(), pool.Close(), c.Close()); err != nil {
			b.Errorf("close: %v", err)
		}
	})
	return d
}

func benchWrite(b *testing.B, d *Device, p []byte, off int64) {
	if err := d.Write(p, off, false); err != nil {
		b.Fatal(err)
	}
}

func benchTake(b *testing.B, d *Device) *Snapshot {
	b.Helper()
	s, err := d.cat.Take("s", []*Device{d}, TakeOptions{Limit: time.Minute})
	if err != nil {
		b.Fatal(err)
	}
	return s
}

func benchDestroy(b *testing.B, s *Snapshot) {
	b.Helper()
	if s.State() != "ok" {
		b.Fatalf("the snapshot is %s", s.State())
	}
	if err := s.Destroy(true); err != nil {
		b.Fatal(err)
	}
}

// benchOrder are the numbers of n blocks in random order, the same in every run.
func benchOrder(n int64) []int {
	return rand.New(rand.NewPCG(1, 2)).Perm(int(n))
}

// BenchmarkOrigin4K is the measure for what follows: the write alone.
func BenchmarkOrigin4K(b *testing.B) {
	d := benchDevice(b, "mem", benchSize, true)
	order, p := benchOrder(benchSize/blockSize), make([]byte, blockSize)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if _, err := d.file.WriteAt(p, int64(order[n%len(order)])*blockSize); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteNoSnapshot(b *testing.B) {
	d := benchDevice(b, "mem", benchSize, true)
	order, p := benchOrder(benchSize/blockSize), make([]byte, blockSize)
	b.Run("Write", func(b *testing.B) {
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			benchWrite(b, d, p, int64(order[n%len(order)])*blockSize)
		}
	})
	b.Run("TryWrite", func(b *testing.B) {
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if err := d.TryWrite(p, int64(order[n%len(order)])*blockSize, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkTryRead reads what is in the page cache.
func BenchmarkTryRead(b *testing.B) {
	d := benchDevice(b, "mem", benchSize, true)
	order, p := benchOrder(benchSize/blockSize), make([]byte, blockSize)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if err := d.TryRead(p, int64(order[n%len(order)])*blockSize); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFirstWrite4K writes each block once after a snapshot, in random order.
func BenchmarkFirstWrite4K(b *testing.B) { benchFirstWrite(b, blockSize) }

// BenchmarkFirstWrite1M does so with each MiB.
func BenchmarkFirstWrite1M(b *testing.B) { benchFirstWrite(b, 1<<20) }

func benchFirstWrite(b *testing.B, size int64) {
	for _, kind := range benchStores {
		b.Run(kind, func(b *testing.B) {
			d := benchDevice(b, kind, benchSize, true)
			order, p := benchOrder(benchSize/size), make([]byte, size)
			// A life before: slots that were used are the rule.
			s := benchTake(b, d)
			for _, at := range order {
				benchWrite(b, d, p, int64(at)*size)
			}
			benchDestroy(b, s)
			s = benchTake(b, d)
			b.SetBytes(size)
			b.ReportAllocs()
			b.ResetTimer()
			for n := range b.N { // b.Loop allows no stop of the clock
				if n > 0 && n%len(order) == 0 {
					b.StopTimer()
					benchDestroy(b, s)
					s = benchTake(b, d)
					b.StartTimer()
				}
				benchWrite(b, d, p, int64(order[n%len(order)])*size)
			}
			b.StopTimer()
			benchDestroy(b, s)
		})
	}
}

// BenchmarkSecondWrite writes blocks that are preserved, with one snapshot and with
// sixteen.
func BenchmarkSecondWrite(b *testing.B) {
	for _, snapshots := range []int{1, 16} {
		b.Run(fmt.Sprint(snapshots), func(b *testing.B) {
			d := benchDevice(b, "mem", benchSize, true)
			order, p := benchOrder(benchSize/blockSize), make([]byte, blockSize)
			for range snapshots {
				benchTake(b, d)
			}
			for _, at := range order {
				benchWrite(b, d, p, int64(at)*blockSize)
			}
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				benchWrite(b, d, p, int64(order[n%len(order)])*blockSize)
			}
		})
	}
}

// BenchmarkImageRead1M reads images in order of which nothing, every second block,
// and all were overwritten.
func BenchmarkImageRead1M(b *testing.B) {
	for _, kind := range benchStores {
		for _, bc := range []struct {
			name string
			step int64 // blocks from one that is overwritten to the next; 0: none is
		}{{"untouched", 0}, {"half", 2}, {"all", 1}} {
			b.Run(kind+"/"+bc.name, func(b *testing.B) {
				d := benchDevice(b, kind, benchSize, true)
				i := benchTake(b, d).Images()[0]
				block := make([]byte, blockSize)
				for at := int64(0); bc.step > 0 && at < benchSize; at += bc.step * blockSize {
					benchWrite(b, d, block, at)
				}
				p := make([]byte, 1<<20)
				b.SetBytes(int64(len(p)))
				b.ReportAllocs()
				for off := int64(0); b.Loop(); off = (off + int64(len(p))) % benchSize {
					if err := i.Read(p, off); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkTake takes a snapshot and destroys it, and says for how long writes were
// held up.
func BenchmarkTake(b *testing.B) {
	for _, size := range []int64{1 << 30, 16<<40 - 4096} {
		b.Run(fmt.Sprintf("%dGiB", (size+1<<30-1)>>30), func(b *testing.B) {
			d := benchDevice(b, "mem", size, false)
			var held time.Duration
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				s := benchTake(b, d)
				held += s.Held()
				n++
				benchDestroy(b, s)
			}
			b.ReportMetric(float64(held.Nanoseconds())/float64(n), "held-ns/op")
		})
	}
}
