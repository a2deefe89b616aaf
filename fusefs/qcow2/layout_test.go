package qcow2

import (
	"testing"

	"pgregory.net/rapid"
)

// TestLayout adds random spans to a layout of tiny tables, and asks it and a slice
// with the kind of each cluster the same.
func TestLayout(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const entries = 64
		l := layout{counts: counts{entries: entries}}
		whole := counts{entries: entries}
		var kinds []kind
		for range rapid.IntRange(0, 8).Draw(t, "spans") {
			s := span{kind: rapid.SampledFrom([]kind{zero, data}).Draw(t, "kind")}
			s.from = int64(len(kinds)) + rapid.SampledFrom([]int64{0, 1, 30, 64, 200}).Draw(t, "gap")
			s.to = s.from + rapid.SampledFrom([]int64{1, 2, 60, 64, 100, 128, 300}).Draw(t, "length")
			if rapid.Bool().Draw(t, "to the end of a table") {
				s.to = ceil(s.to, entries) * entries
			}
			for int64(len(kinds)) < s.from {
				kinds = append(kinds, absent)
			}
			for int64(len(kinds)) < s.to {
				kinds = append(kinds, s.kind)
			}
			if err := l.add(s, free); err != nil {
				t.Fatal(err)
			}
			whole.add(s)
		}
		if whole != l.counts {
			t.Errorf("counts of spans, and of their pieces\n got %v\nwant %v", l.counts, whole)
		}
		for len(kinds)%entries != 0 {
			kinds = append(kinds, absent)
		}
		checkLayout(t, &l, kinds)
	})
}

// checkLayout checks the places of all tables and data clusters.
func checkLayout(t *rapid.T, l *layout, kinds []kind) {
	var tables, clusters int64 // of the file, so far
	for index := range int64(len(kinds)) / l.entries {
		inFile := false
		for _, k := range kinds[index*l.entries:][:l.entries] {
			inFile = inFile || k != absent
		}
		n, ok := l.table(index)
		if ok != inFile || ok && n != tables {
			t.Fatalf("table %d\n got %d, %v\nwant %d, %v", index, n, ok, tables, inFile)
		}
		if !ok {
			continue
		}
		s, _ := l.find(func(s *stretch) bool { return s.tables <= n })
		for entry := range l.entries {
			c := index*l.entries + entry
			if got := s.kindOf(entry); got != kinds[c] {
				t.Fatalf("kind of cluster %d\n got %d\nwant %d", c, got, kinds[c])
			}
			if got := s.before(n, entry, l.entries); got != clusters {
				t.Fatalf("data clusters before %d\n got %d\nwant %d", c, got, clusters)
			}
			if kinds[c] != data {
				continue
			}
			first, count := l.cluster(clusters)
			if first != c || count < 1 {
				t.Fatalf("data cluster %d\n got %d, %d in a row\nwant %d", clusters, first, count, c)
			}
			for i := range count {
				if kinds[c+i] != data {
					t.Fatalf("from cluster %d on %d are said to be data, but %d is not", c, count, c+i)
				}
			}
			clusters++
		}
		tables++
	}
	if n, ok := l.table(int64(len(kinds)) / l.entries); ok {
		t.Errorf("a table behind the last is said to be number %d", n)
	}
	if l.counts.tables != tables || l.counts.data != clusters {
		t.Errorf("tables and data clusters\n got %d, %d\nwant %d, %d", l.counts.tables, l.counts.data, tables, clusters)
	}
}

// TestPlan checks that the parts follow each other and are as long as they must
// be, and no longer.
func TestPlan(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		shift := uint(rapid.IntRange(minShift, maxShift).Draw(t, "shift"))
		cluster := int64(1) << shift
		size := 512 * rapid.Int64Range(1, 16<<40/512).Draw(t, "sectors")
		clusters := ceil(size, cluster)
		data := rapid.Int64Range(0, clusters).Draw(t, "data")
		tables := rapid.Int64Range(ceil(data, cluster/8), ceil(clusters, cluster/8)).Draw(t, "tables")

		p := planFor(size, shift, tables, data)
		blocks := (p.tables - p.refBlocks) / cluster
		all := p.end / cluster
		for what, ok := range map[string]bool{
			"header":                p.l1 == cluster,
			"L1 entries":            p.l1Entries == ceil(clusters, cluster/8),
			"L1 table":              p.refTable-p.l1 == ceil(p.l1Entries*8, cluster)*cluster,
			"refcount table":        p.refBlocks-p.refTable == ceil(blocks*8, cluster)*cluster,
			"refcount blocks":       blocks*(cluster/2) >= all,
			"no refcounts too many": (blocks-1)*(cluster/2) < all,
			"tables":                p.data-p.tables == tables*cluster,
			"data":                  p.end-p.data == data*cluster,
		} {
			if !ok {
				t.Errorf("%s: %+v", what, p)
			}
		}
	})
}
